"""Plans: what each task should own within a budget of bytes, chosen from a comparison."""

from .assembling import assemble
from .curve import plan_curve
from .plans import Plan, plan
from .training import train_plan

__all__ = ["Plan", "assemble", "plan", "plan_curve", "train_plan"]
