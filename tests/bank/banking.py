"""What the tests of the bank share: a small model, and an operating system that fails on demand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.core.sites import named_tensors

CHANGES = frozenset({"open", "write", "fsync", "rename", "replace", "mkdir", "makedirs", "rmdir"})


def make_base() -> nn.Module:
    """A small convolutional base, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2)
        )


def images(rows: int = 4) -> Tensor:
    """A batch for that base."""
    return torch.randn(rows, 3, 8, 8)


def make_model(base: nn.Module, *tasks: str, method: str = "taps", seed: int = 0) -> Any:
    """A model whose tasks look trained, with facts."""
    torch.manual_seed(seed)
    model = weft.MultiTaskModel(base, weft.method(method, base), example=images(2))
    for name in tasks or ("a", "b"):
        model.add_task(name, weft.Classification(3))
        model.tasks[name].facts["seed"] = seed
    disturb(model)
    return model


def disturb(model: weft.MultiTaskModel) -> None:
    """Move all that the tasks own or train together away from its start."""
    tensors = list(model.shared_trainable().values())
    for name in model.task_names:
        tensors += [*model.tasks[name].own.values(), *model.tasks[name].parameters()]
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.dim():
                tensor += 0.05 * torch.rand(tensor.shape).to(tensor)


def outputs(model: weft.MultiTaskModel, x: Any) -> dict[str, Tensor]:
    """What every task says in eval mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        found = model.predict_all(x)
    model.train(was)
    return found


def assert_same_model(loaded: weft.MultiTaskModel, saved: weft.MultiTaskModel, x: Any) -> None:
    """Two models agree bit for bit in everything that travels through a bank."""
    assert loaded.task_names == saved.task_names
    mine, theirs = outputs(loaded, x), outputs(saved, x)
    for name in saved.task_names:
        assert torch.equal(mine[name], theirs[name]), name
        assert_same_tensors(detached(loaded.tensors(name)), detached(saved.tensors(name)))
        heads = loaded.head(name), saved.head(name)
        if heads[1] is not None:
            assert_same_tensors(dict(named_tensors(heads[0])), dict(named_tensors(heads[1])))
        assert loaded.ledger(name) == saved.ledger(name)
        assert loaded.tasks[name].facts == saved.tasks[name].facts


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, types, layouts and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].stride() == tensor.stride(), name
        assert torch.equal(found[name], tensor), name


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of tensors."""
    return {name: t.detach() for name, t in tensors.items()}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a module."""
    return {name: t.detach().clone() for name, t in named_tensors(module)}


class Faulty:
    """The ``os`` module, except that its n-th change of the file system goes wrong.

    Args:
        at: which change, from 1; 0 for none.
        fault: what to do then.
    """

    def __init__(self, at: int, fault: Callable[[], None]) -> None:
        self.at = at
        self.fault = fault
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in CHANGES:
            return function

        def counted(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                self.count += 1
                if self.count == self.at:
                    if name == "write":
                        function(args[0], bytes(args[1])[: len(args[1]) // 2])
                    self.fault()
            return function(*args, **kwargs)

        return counted


def full_disk() -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file of a bank by relative path, without its lock and staging folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not str(path.relative_to(folder)).startswith((".lock", ".staging"))
    }
