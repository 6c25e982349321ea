"""Data from a function of the user's own file."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from weft.data.arrays import from_arrays
from weft.data.request import Request, listing
from weft.data.sets import TaskData, size


def read_function(request: Request) -> TaskData:
    """Call a function without arguments and take the data it returns.

    The function returns a ``TaskData``, or ``(train, val)`` or ``(train, val, test)`` of map-style
    data sets (None for a split that is missing), or a dict of arrays named as in a .npz file.

    Args:
        request: what was asked for; the path is ``FILE.py:FUNCTION``.

    Returns:
        The data of the task.

    Raises:
        DataError: the file or function is missing, or returns something else.
    """
    file_name, separator, function_name = request.path.rpartition(":")
    if not separator or not function_name.isidentifier():
        raise request.error("expected python:FILE.py:FUNCTION. Name a function after a colon.")
    file = Request(request.spec, file_name).existing(folder=False)
    spec = importlib.util.spec_from_file_location(f"weft_data_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise request.error(f"{file} is no Python file; expected a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    # Classes of the file can be pickled, for loader workers, only if their module can be found.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = vars(module).get(function_name)
    if not callable(function):
        known = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise request.unknown(f"function {function_name}", function_name, known)
    return _accept(request, function())


def _accept(request: Request, result: Any) -> TaskData:
    if isinstance(result, TaskData):
        return result
    if isinstance(result, dict):
        return from_arrays(request, {str(k): np.asarray(v) for k, v in result.items()})
    if isinstance(result, (tuple, list)) and len(result) in (2, 3):
        parts = (*result, None)[:3]
        if all(part is None or isinstance(part, Dataset) for part in parts):
            for part in parts:
                if part is not None:
                    size(part)
            return TaskData(parts[0], parts[1], parts[2], source=request.spec)
        found = listing([type(part).__name__ for part in result])
    else:
        found = type(result).__name__
    raise request.error(
        f"the function returned {found}; expected a TaskData, (train, val) or (train, val, test) "
        "of torch data sets, or a dict of arrays named as in a .npz file. Return one of these."
    )
