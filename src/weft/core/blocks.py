"""Residual blocks: modules that add a branch to what goes around it, found by what they do.

A block computes ``x + F(x)`` or ``S(x) + F(x)``, with or without a ReLU on the sum. With all its
tensors at zero the branch is zero, and what goes around it is left: this is how a block is found,
whatever its class is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from weft.errors import PlanError

from .rows import call_arguments, count_rows
from .sites import Kind, check_names, named_tensors, sites
from .state import private_copy


@dataclass(frozen=True)
class ResidualBlock:
    """What is known of a residual block.

    Args:
        shortcut: the child whose output goes around the branch, or "" if the input itself does.
        channels: channels of the block's input.
        channel_dim: the dimension of the input that holds them, 1 or -1.
        indivisible: why single rows of its input cannot be left out, or "".
    """

    shortcut: str
    channels: int
    channel_dim: int
    indivisible: str = ""


def residual_blocks(
    base: nn.Module, example: Any, blocks: Iterable[str] | Mapping[str, str] | None = None
) -> dict[str, ResidualBlock]:
    """The residual blocks of a network by site, in the order in which they run.

    A block holds a convolution, a linear layer or an attention; no other block is inside it.

    Args:
        base: any module; it is left alone.
        example: one batch for the base; rows of one suffice.
        blocks: sites to take as blocks, as a mapping with the child that is the shortcut or "";
            default: all that are found.

    Returns:
        The blocks; none if the base has none.

    Raises:
        PlanError: a site of ``blocks`` is no residual block, with the reason.
    """
    buffers = frozenset(n for n, t in named_tensors(base) if not isinstance(t, nn.Parameter))
    net = private_copy(base, buffers).eval()
    args, kwargs = call_arguments((_on_the_side_of(net, example),), {})
    rows, modules, layers = count_rows(args, kwargs), dict(net.named_modules()), _layers(net)
    candidates = {path for path in modules if path in layers or _inside(path, layers)} - {""}
    if blocks is not None:
        candidates = set(blocks)
        check_names(candidates, [path for path in modules if path], "The block")
    findings: dict[str, ResidualBlock | str] = {}
    with torch.no_grad():
        for path, calls in _watch(net, args, kwargs).items():
            if path in candidates:
                findings[path] = _examine(modules[path], calls, rows)
    if blocks is None:
        found = {path: f for path, f in findings.items() if isinstance(f, ResidualBlock)}
        return {path: f for path, f in found.items() if not _inside(path, found)}
    return _checked(blocks, findings)


def _checked(
    blocks: Iterable[str] | Mapping[str, str], findings: Mapping[str, ResidualBlock | str]
) -> dict[str, ResidualBlock]:
    """The blocks that were asked for, if they are what the caller says.

    Raises:
        PlanError: one is not.
    """
    taken: dict[str, ResidualBlock] = {}
    for path in blocks:
        finding = findings.get(path, "the base does not call it on the example")
        if isinstance(finding, str):
            raise PlanError(f"'{path}' is no residual block: {finding}.")
        stated = blocks[path] if isinstance(blocks, Mapping) else finding.shortcut
        if stated != finding.shortcut:
            raise PlanError(
                f"The shortcut of block '{path}' is {finding.shortcut!r}, not {stated!r}."
            )
        if _inside(path, blocks):
            raise PlanError(f"Block '{path}' has another block inside; take one of them.")
        taken[path] = finding
    return {path: taken[path] for path in findings}


def _layers(module: nn.Module) -> list[str]:
    """Paths of the convolutions, linear layers and attentions in a module."""
    return [s.name for s in sites(module) if s.kind in (Kind.LAYER, Kind.DEPTHWISE)]


def _inside(path: str, others: Iterable[str]) -> bool:
    """Whether one of the others is inside the module of this path."""
    return any(other.startswith(f"{path}.") for other in others)


def _on_the_side_of(net: nn.Module, example: Any) -> Any:
    """The example on the device and in the floating type of the base."""
    tensors = [t for _, t in named_tensors(net) if t.is_floating_point()]
    like = tensors[0] if tensors else torch.empty(0)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(like if tensor.is_floating_point() else like.device)

    return pytree.tree_map_only(Tensor, moved, example)


@dataclass
class _Calls:
    """The calls of one module in a forward: how many, and the last one's inputs and output."""

    count: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


def _watch(net: nn.Module, args: Any, kwargs: Any) -> dict[str, _Calls]:
    """The calls of all modules in one forward, by path, in the order in which they end."""
    seen: dict[str, _Calls] = {}

    def hook(path: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            count = seen.pop(path, _Calls()).count
            seen[path] = _Calls(count + 1, args, kwargs, output)

        return note

    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in net.named_modules()
        if path
    ]
    net(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def _examine(module: nn.Module, calls: _Calls, rows: int) -> ResidualBlock | str:
    """The block that a module is, or why it is none."""
    if calls.count > 1:
        return f"it is called {calls.count} times in one forward"
    if not calls.args or not isinstance(calls.args[0], Tensor):
        return "its input is no tensor in the first place of its arguments"
    if not isinstance(calls.output, Tensor):
        return f"its output is a {type(calls.output).__name__}, not a tensor"
    given, *others = calls.args
    if not given.is_floating_point() or given.dim() < 2:
        return "its input is no tensor of features"
    noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(0))
    x, rest = noise.to(given), (tuple(others), calls.kwargs)
    try:
        shortcut = _shortcut(module, x, *rest)
    except Exception as error:  # whatever a module of the user's does with zeros
        return f"it fails with its tensors at zero ({error})"
    if shortcut is None:
        return (
            "with its tensors at zero it gives neither its input, nor ReLU of it, nor what one of "
            "its children makes of it. A block that normalises the sum (post-norm) is none"
        )
    dim = _channel_dim(module, given)
    return ResidualBlock(shortcut, given.shape[dim], dim, _indivisible(given, rows, rest))


def _shortcut(
    module: nn.Module, x: Tensor, others: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str | None:
    """What goes around the branch: "" for the input, a child's name, or None for neither."""
    zeros = {name: _zero(tensor) for name, tensor in named_tensors(module)}
    given = x.clone()
    left = functional_call(module, zeros, (given, *others), dict(kwargs))
    if not torch.equal(given, x):
        return None  # the input that goes around is not the one that came in
    if _is_sum_with_zero(left, x):
        return ""
    seen = _watch(module, (x.clone(), *others), kwargs)
    layers = {path.partition(".")[0] for path in _layers(module)}
    for name, child in module.named_children():
        calls = seen.get(name)
        if calls is None or calls.count > 1 or calls.kwargs or len(calls.args) != 1:
            continue
        if not _same(calls.args[0], x) or not layers - {name}:
            continue
        kept = {key: tensor for key, tensor in named_tensors(module) if key.startswith(f"{name}.")}
        left = functional_call(module, {**zeros, **kept}, (x.clone(), *others), dict(kwargs))
        if _is_sum_with_zero(left, child(x.clone())):
            return name
    return None


def _zero(tensor: Tensor) -> Tensor:
    # Buffers of whole numbers are places and masks, not weights.
    return torch.zeros_like(tensor) if tensor.is_floating_point() else tensor


def _is_sum_with_zero(found: Any, around: Any) -> bool:
    return isinstance(around, Tensor) and (_same(found, around) or _same(found, around.relu()))


def _same(found: Any, expected: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    )


def _channel_dim(module: nn.Module, x: Tensor) -> int:
    """Tokens and vectors have channels last, maps first, unless the block's tensors tell better."""
    usual, other = (-1, 1) if x.dim() <= 3 else (1, -1)
    sizes = {size for _, tensor in named_tensors(module) for size in tensor.shape}
    return other if x.shape[usual] not in sizes and x.shape[other] in sizes else usual


def _indivisible(x: Tensor, rows: int, rest: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    if x.shape[0] != rows:
        return "its input does not have the rows of the batch first"
    if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(rest)):
        return "it is called with other tensors beside its input"
    return ""
