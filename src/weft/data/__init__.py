"""From a data spec to data sets and loaders, for one task."""

from weft.data.checks import check
from weft.data.loading import Loader, loader
from weft.data.sets import ArrayData, Inputs, TaskData
from weft.data.specs import READERS, Reader, load, without_other_targets
from weft.data.splitting import stratified_split
from weft.data.transforms import Augmentation, Preprocessing

__all__ = [
    "READERS",
    "ArrayData",
    "Augmentation",
    "Inputs",
    "Loader",
    "Preprocessing",
    "Reader",
    "TaskData",
    "check",
    "load",
    "loader",
    "stratified_split",
    "without_other_targets",
]
