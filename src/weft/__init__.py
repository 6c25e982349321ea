"""One base network, many tasks: learn what each task owns and what it shares."""

from .bank import Bank
from .comparing import compare
from .compute import Compute, multiply_adds
from .core.ledger import Ledger
from .core.model import MultiTaskModel, Step
from .core.sharing import Sharing
from .core.task import Task
from .core.view import View
from .errors import WeftError
from .exporting import export
from .joint import efficient_joint, pretrain
from .merging import merge
from .methods.adashare import adashare
from .methods.baselines import bias_only, full_finetune, linear_probe
from .methods.bora import bora, tie_to_mean
from .methods.disparse import disparse
from .methods.dynashare import dynashare
from .methods.hard_sharing import hard_sharing
from .methods.lora import lora
from .methods.model_patches import depthwise_patch, scale_bias
from .methods.paco import paco
from .methods.rcm import rcm
from .methods.taps import taps
from .planning import Plan, plan
from .registry import METHODS, method
from .reporting import report
from .tasks import (
    Binary,
    Classification,
    DenseRegression,
    Depth,
    Regression,
    Segmentation,
    SurfaceNormals,
    relative_improvement,
)
from .training import History, evaluate, fit

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Bank",
    "Binary",
    "Classification",
    "Compute",
    "DenseRegression",
    "Depth",
    "History",
    "Ledger",
    "MultiTaskModel",
    "Plan",
    "Regression",
    "Segmentation",
    "Sharing",
    "Step",
    "SurfaceNormals",
    "Task",
    "View",
    "WeftError",
    "adashare",
    "bias_only",
    "bora",
    "compare",
    "depthwise_patch",
    "disparse",
    "dynashare",
    "efficient_joint",
    "evaluate",
    "export",
    "fit",
    "full_finetune",
    "hard_sharing",
    "linear_probe",
    "lora",
    "merge",
    "method",
    "multiply_adds",
    "paco",
    "plan",
    "pretrain",
    "rcm",
    "relative_improvement",
    "report",
    "scale_bias",
    "taps",
    "tie_to_mean",
]
