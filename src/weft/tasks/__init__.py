"""Built-in tasks: heads, losses and metrics for the usual kinds of labels.

Each function returns a `Task` whose ``spec`` brings it back from a file. Heads, losses and checks
are modules and classes of these files, so models with them pickle.
"""

from .binary import Binary
from .classification import Classification
from .dense import DenseRegression
from .depth import Depth
from .heads import DilatedBranches, PooledLinear, pool
from .kinds import KINDS, check_options, task_from_spec
from .normals import SurfaceNormals
from .regression import Regression
from .relative import relative_improvement
from .segmentation import Segmentation

__all__ = [
    "KINDS",
    "Binary",
    "Classification",
    "DenseRegression",
    "Depth",
    "DilatedBranches",
    "PooledLinear",
    "Regression",
    "Segmentation",
    "SurfaceNormals",
    "check_options",
    "pool",
    "relative_improvement",
    "task_from_spec",
]
