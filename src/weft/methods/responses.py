"""What the layers of a base answer on inputs, and which normalisation alone reads an answer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from weft.core.channels import is_plain, output_channels
from weft.core.kernels import has_hooks
from weft.core.rows import call_arguments
from weft.core.sites import Kind, sites
from weft.errors import DataError, WeftError, kind_of

LAYERS = (Kind.LAYER, Kind.DEPTHWISE)

_ASK = ("size", "dim", "stride", "numel", "is_contiguous", "is_floating_point", "ndimension")
"""Functions of tensors that read no number in them."""


@dataclass
class Seen:
    """The responses of one layer, as sums over rows and places.

    Args:
        count: how many.
        total: their sum, (out,).
        products: of their outer products, (out, out).
        norm: name of the normalisation with statistics that is the only one to read them, and reads
            nothing else; None if there is none, or if that cannot be seen.
    """

    count: int
    total: Tensor
    products: Tensor
    norm: str | None = None


@singledispatch
def outputs_first(layer: Any) -> bool:  # noqa: ARG001
    """Whether rows of the layer's weight are its outputs, which all read the same inputs."""
    return False


@outputs_first.register
def _(layer: nn.Linear) -> bool:  # noqa: ARG001
    return True


@outputs_first.register
def _(layer: _ConvNd) -> bool:
    return layer.groups == 1


@outputs_first.register
def _(layer: _ConvTransposeNd) -> bool:  # noqa: ARG001
    return False


@torch.no_grad()
def layer_responses(base: nn.Module, batches: Iterable[Any]) -> dict[str, Seen]:
    """Run a copy of the base in eval mode and sum up the answers of its layers.

    Args:
        base: any network.
        batches: inputs, or pairs of inputs and targets; a tuple or dict of inputs is spread out,
            without its "labels".

    Returns:
        By layer, its sums. Left out are grouped convolutions, and layers with hooks or of other
        libraries, whose answers need not be linear in their weights.

    Raises:
        DataError: no batch, one that the base does not take, or answers that are no numbers.
    """
    if isinstance(batches, Tensor):
        raise DataError(
            "rcm(responses=...) is batches of inputs, found one tensor. Give it as responses=[x]."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, (str, Mapping)):
        raise DataError(
            "rcm(responses=...) is batches of inputs, a DataLoader or a list, found "
            f"{kind_of(batches)}."
        )
    network = copy.deepcopy(base).eval()
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in network.modules())
    watch = _Watch()
    for site in sites(network):
        module = network.get_submodule(site.name)
        channels = output_channels(module)
        if not is_plain(module) or has_hooks(module):
            continue  # it may do more than its class says
        if site.statistics:
            watch.normalisation(site.name, module)
        elif site.kind in LAYERS and channels and outputs_first(module):
            watch.layer(site.name, module, channels.axis)
    given = 0
    for batch in batches:
        given += 1
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if isinstance(x, Mapping):  # targets may lie among the inputs, as in transformers
            x = {name: value for name, value in x.items() if name != "labels"}
        args, kwargs = call_arguments((x,), {})
        try:
            with watch, torch.compiler.set_stance("force_eager"):
                outputs = network(*args, **kwargs)
        except (WeftError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a network does with inputs that it does not take
            raise DataError(
                f"rcm(responses=...): the base fails on batch {given - 1}: {error}. Give batches "
                "of inputs as the base takes them."
            ) from error
        watch.end(outputs)
    if not given:
        raise DataError("rcm(responses=...) gave no batch. Give at least one batch of inputs.")
    for name, seen in watch.seen.items():
        if not seen.count or not bool(torch.isfinite(seen.products).all()):
            what = "no rows" if not seen.count else "values that are no finite numbers"
            raise DataError(
                f"rcm(responses=...): the layer '{name}' answers with {what}. Check the inputs."
            )
        # What a scripted module reads cannot be seen.
        seen.norm = None if scripted else watch.only_reader(name)
    return watch.seen


@final
class _Watch(TorchFunctionMode):
    """In this context the answers of layers are summed up, and who reads them is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Seen] = {}
        self._answers: dict[int, tuple[str, Tensor]] = {}  # tensors are kept: no id is used twice
        self._read_by: dict[str, set[str]] = {}
        self._reads: dict[str, set[str | None]] = {}
        self._read_elsewhere: set[str] = set()
        self._inside = False
        """Whether a hook, or a normalisation that is known to read its input, is at work."""

    def layer(self, name: str, module: nn.Module, axis: int) -> None:
        """Sum up what a layer answers, with its channels along an axis."""

        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            self._inside = True
            flat = output.movedim(axis, -1).reshape(-1, output.shape[axis]).double()
            seen = self.seen.setdefault(name, Seen(0, flat.new_zeros(()), flat.new_zeros(())))
            seen.count += len(flat)
            seen.total = seen.total + flat.sum(0)
            seen.products = seen.products + flat.T @ flat
            self._answers[id(output)] = name, output
            self._inside = False

        module.register_forward_hook(note)

    def normalisation(self, name: str, module: nn.Module) -> None:
        """Note which layer a normalisation reads."""

        def begin(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            (x,) = (*inputs, *named.values())
            layer = self._answers[id(x)][0] if id(x) in self._answers else None
            self._reads.setdefault(name, set()).add(layer)
            if layer is not None:
                self._read_by.setdefault(layer, set()).add(name)
            self._inside = True

        def end(_: nn.Module, __: Any, ___: Any) -> None:
            self._inside = False

        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(end)

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        # An attribute such as shape reads nothing; one that is a tensor, such as T, does.
        asks = func.__name__ in _ASK
        asks = asks or (func.__name__ == "__get__" and not isinstance(result, Tensor))
        if not self._inside and not asks:
            self._note_readers((args, given))
        return result

    def end(self, outputs: Any) -> None:
        """A forward is over; what the network returns is read by its caller."""
        self._note_readers(outputs)
        self._answers.clear()

    def _note_readers(self, values: Any) -> None:
        for leaf in pytree.tree_leaves(values):
            if id(leaf) in self._answers:
                self._read_elsewhere.add(self._answers[id(leaf)][0])

    def only_reader(self, layer: str) -> str | None:
        """The normalisation that alone reads a layer, and reads it alone."""
        readers = self._read_by.get(layer, set())
        if len(readers) != 1 or layer in self._read_elsewhere:
            return None
        (norm,) = readers
        return norm if self._reads[norm] == {layer} else None
