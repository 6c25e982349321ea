"""The sites of a network: which modules hold which tensors, and of what kind they are.

This file and `channels` are the places that look at layer types. Everything else works on names and
kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from weft.errors import PlanError, close_matches, kind_of

Slot = tuple[str, dict[str, Tensor], str]
"""A place that holds a tensor: its canonical name, its table, and its attribute there."""


class Kind(Enum):
    """What a parameter-bearing module is."""

    LAYER = "layer"  # convolution, linear, attention projections, recurrent
    DEPTHWISE = "depthwise"  # a convolution with one filter group per input channel
    NORM = "norm"  # normalisation and other per-channel vectors
    EMBEDDING = "embedding"
    OTHER = "other"  # bare parameters: tokens, positions, layer scales of unknown modules


@dataclass(frozen=True)
class Site:
    """One module that holds tensors of its own.

    Args:
        name: the module's name in the base ("" for the base itself).
        kind: what it is.
        parameters: canonical names of its parameters.
        biases: those of them that are added per channel.
        statistics: canonical names of its running statistics.
        refusal: why a per-layer patch cannot be right here, or "".
    """

    name: str
    kind: Kind
    parameters: tuple[str, ...]
    biases: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    refusal: str = ""


def join(module: str, attribute: str) -> str:
    """The name of a tensor from its module's name and its attribute."""
    return f"{module}.{attribute}" if module else attribute


def tensor_slots(module: nn.Module) -> list[Slot]:
    """Every place that holds a tensor.

    Tied tensors have several places and one canonical name, the first. Modules that are used
    twice are visited once.

    Raises:
        PlanError: this is no module, a lazy module has not seen its input yet, or tensors lie in
            a scripted module, where they stay.
    """
    if not isinstance(module, nn.Module):
        raise PlanError(
            f"The base is a torch.nn.Module, found {kind_of(module)}. Give the network itself, for "
            "instance torchvision.models.resnet18()."
        )
    first: dict[int, str] = {}
    slots: list[Slot] = []
    for path, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule) and _holds_tensors(child):
            raise PlanError(
                f"'{path}' of the base is a TorchScript module, whose tensors cannot be exchanged. "
                "Give the plain module that it was scripted from."
            )
        for table in (child._parameters, child._buffers):
            for attribute, tensor in table.items():
                if tensor is None:
                    continue
                if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
                    raise PlanError(
                        f"'{join(path, attribute)}' of the base has no shape yet. "
                        "Run the base once on an example before handing it over."
                    )
                name = first.setdefault(id(tensor), join(path, attribute))
                slots.append((name, table, attribute))
    return slots


def _holds_tensors(module: nn.Module) -> bool:
    own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return any(True for tensors in own for _ in tensors)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by canonical name, in the order of the modules; tied ones once."""
    seen: set[str] = set()
    for name, table, attribute in tensor_slots(module):
        if name not in seen:
            seen.add(name)
            yield name, table[attribute]


def renormed_weights(module: nn.Module, slots: Iterable[Slot]) -> frozenset[str]:
    """Names of the weights of embeddings with a largest norm: reading rows scales them in place.

    Args:
        module: holds them.
        slots: all of the module.
    """
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    tables = {
        id(child._parameters)
        for child in module.modules()
        if isinstance(child, embeddings) and child.max_norm is not None
    }
    return frozenset(name for name, table, _ in slots if id(table) in tables)


def canonical_names(base: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer, with the first name of the same tensor.

    Tied tensors have several names; a patch of any of them is a patch of all of them.
    """
    first = {id(table[attribute]): name for name, table, attribute in tensor_slots(base)}
    return {
        join(path, attribute): first[id(tensor)]
        for path, module in base.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for attribute, tensor in table.items()
        if tensor is not None
    }


def statistics_modules(base: nn.Module) -> dict[str, tuple[str, ...]]:
    """Modules that update running statistics in training mode, with the names of these buffers."""
    canonical = canonical_names(base)
    return {
        path: tuple(canonical[join(path, n)] for n, b in module._buffers.items() if b is not None)
        for path, module in base.named_modules()
        if isinstance(module, _NormBase)
        and module.track_running_stats
        and module._buffers.get("running_mean") is not None
    }


def keep_weights_apart(module: nn.Module) -> None:
    """Keep recurrent layers from moving their weights into one block of memory on a GPU.

    They would move tensors that other tasks use, too.
    """
    for child in module.modules():
        if isinstance(child, nn.RNNBase):
            child.flatten_parameters = _leave_as_they_are  # type: ignore[method-assign]


def _leave_as_they_are() -> None:
    pass


def is_fused(module: nn.Module) -> bool:
    """Whether a module may read its children's weights instead of calling them."""
    return isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In this context layers that drop numbers at random let all of them pass."""
    dropping = [m for m in module.modules() if isinstance(m, _DropoutNd) and m.training]
    for layer in dropping:
        layer.training = False
    try:
        yield
    finally:
        for layer in dropping:
            layer.training = True


def sites(base: nn.Module) -> list[Site]:
    """All modules that hold tensors of their own, in order of registration."""
    canonical = canonical_names(base)
    statistics = statistics_modules(base)
    found = []
    for path, module in base.named_modules():
        own = {a: canonical[join(path, a)] for a, p in module._parameters.items() if p is not None}
        stats = statistics.get(path, ())
        if not own and not stats:
            continue
        kind = _kind(module)
        biases = tuple(
            name
            for attribute, name in own.items()
            if "bias" in attribute
            and (kind is Kind.NORM or module._parameters[attribute].dim() == 1)
        )
        refusal = _refusal(module)
        found.append(Site(path, kind, tuple(dict.fromkeys(own.values())), biases, stats, refusal))
    return found


def everything(base: nn.Module) -> frozenset[str]:
    """Names of all parameters and running statistics."""
    return frozenset(name for s in sites(base) for name in s.parameters + s.statistics)


def layer_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of convolutions and other layers: no biases, no normalisation."""
    layers = [s for s in sites(module) if s.kind in (Kind.LAYER, Kind.DEPTHWISE) and not s.refusal]
    matrices = {n for n, p in module.named_parameters() if p.dim() > 1 and p.is_floating_point()}
    found = [n for s in layers for n in s.parameters if n in matrices]
    return tuple(dict.fromkeys(n for n in found if "bias" not in n.rpartition(".")[2]))


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, _ConvNd):
        depthwise = module.groups > 1 and module.groups == module.in_channels
        return Kind.DEPTHWISE if depthwise else Kind.LAYER
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)):
        return Kind.LAYER
    if isinstance(module, nn.RNNCellBase):
        return Kind.LAYER
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return Kind.EMBEDDING
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return Kind.NORM
    # Modules of other libraries: a leaf whose parameters are all vectors scales or shifts channels;
    # a leaf with a matrix called "weight" is a layer (for instance transformers' Conv1D).
    is_leaf = next(module.children(), None) is None
    vectors = all(p is None or p.dim() <= 1 for p in module._parameters.values())
    if is_leaf and vectors:
        return Kind.NORM
    weight = module._parameters.get("weight")
    if is_leaf and weight is not None and weight.dim() >= 2:
        return Kind.LAYER
    return Kind.OTHER


def _refusal(module: nn.Module) -> str:
    if "parametrizations" in module._modules:
        return "its tensors are reparametrised; remove the parametrisation or own the whole layer"
    return ""


def check_names(asked: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse names that the base does not have.

    Raises:
        PlanError: names the first unknown one, with close matches.
    """
    existing = set(known)
    for name in asked:
        if name not in existing:
            hint = close_matches(name, existing)
            raise PlanError(f"{what} '{name}' is not in the base.{hint}")
