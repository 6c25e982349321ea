"""Training over Accelerate: fit, evaluate, phases, checkpoints."""

from .evaluation import evaluate
from .fitting import fit
from .history import Epoch, History

__all__ = ["Epoch", "History", "evaluate", "fit"]
