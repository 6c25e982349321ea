"""Law 6: the ledger equals what the task really owns, and the closed formula of its method."""

from __future__ import annotations

import copy
import math
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import weft
from laws.cases import Case, Law, cases
from weft.core.sites import Kind, named_tensors, sites


@cases(Law.LEDGER_IS_EXACT)
def test_ledger_counts_what_hardening_keeps(case: Case) -> None:
    model = case.trained()
    ledger = model.ledger("a")
    hardened = copy.deepcopy(model)
    hardened.harden("a")
    own = dict(hardened.tasks["a"].own)
    parameters = [t for t in own.values() if isinstance(t, nn.Parameter)]
    buffers = [t for t in own.values() if not isinstance(t, nn.Parameter)]
    assert ledger.own_parameters == sum(t.numel() for t in parameters)
    assert ledger.own_buffers == sum(t.numel() for t in buffers)
    assert ledger.own_bytes == sum(t.numel() * t.element_size() for t in own.values())
    assert ledger.head_parameters == sum(p.numel() for p in model.head("a").parameters())
    assert ledger.base_parameters == sum(p.numel() for p in model.base.parameters())
    assert ledger.own_fraction == ledger.own_parameters / ledger.base_parameters
    tensors = dict(named_tensors(model.base))
    of_base = [r for r in ledger.rows if r.tensor in tensors]
    assert [r.tensor for r in of_base] == list(tensors)
    assert [r.size for r in of_base] == [t.numel() for t in tensors.values()]


@cases(Law.LEDGER_IS_EXACT)
def test_ledger_equals_the_formula_of_the_method(case: Case) -> None:
    model = case.trained()
    if case.method not in FORMULAS:
        raise AssertionError(f"Add the closed formula of '{case.method}' to FORMULAS.")
    assert model.ledger("a").own_parameters == FORMULAS[case.method](model)


def _sizes(model: weft.MultiTaskModel, names: set[str]) -> int:
    return sum(p.numel() for n, p in model.base.named_parameters() if n in names)


def _norms(model: weft.MultiTaskModel) -> set[str]:
    return {n for s in sites(model.base) if s.kind is Kind.NORM for n in s.parameters}


def _depthwise(model: weft.MultiTaskModel) -> set[str]:
    return {n for s in sites(model.base) if s.kind is Kind.DEPTHWISE for n in s.parameters}


def _open_layers(model: weft.MultiTaskModel) -> set[str]:
    own = model.tasks["a"].own
    layers = [s for s in sites(model.base) if s.kind in (Kind.LAYER, Kind.DEPTHWISE)]
    is_open = {s.name: float(own[f"{s.name}:score"].detach()) >= 0.1 for s in layers}
    return {n for s in layers if is_open[s.name] for n in s.parameters}


def _vectors_called_bias(model: weft.MultiTaskModel) -> set[str]:
    parameters: dict[str, Tensor] = dict(model.base.named_parameters())
    return {n for n, p in parameters.items() if "bias" in n.rpartition(".")[2] and p.dim() == 1}


def _private_end(model: weft.MultiTaskModel) -> int:
    """The first layers with their normalisation, cut nearest to a tenth, and batch norms."""
    size = {n: p.numel() for n, p in model.base.named_parameters()}
    best, reached, private = 2.0, 0, set()
    owned: set[str] = set()
    found = sites(model.base)
    starts = [i for i, s in enumerate(found) if s.kind is not Kind.NORM or i == 0]
    for unit, start in enumerate(starts[:-1] or starts):
        end = [*starts, len(found)][unit + 1]
        owned |= {n for s in found[start:end] for n in s.parameters}
        reached = sum(size[n] for n in owned)
        distance = abs(reached / sum(size.values()) - 0.1)
        if distance < best:
            best, private = distance, set(owned)
    normalised = {n for s in found if s.statistics for n in s.parameters}
    return _sizes(model, private | normalised)


def _blocks(model: weft.MultiTaskModel) -> int:
    return len(model.sharing.options["blocks"])


def _two_factors(model: weft.MultiTaskModel, r: int = 8) -> int:
    """Rank r at all layers but depthwise ones and tied weights, shared out among groups."""
    tensors = dict(model.base.named_parameters())
    found = sites(model.base)
    used = Counter(n for s in found for n in s.parameters)
    count = 0
    for site in (s for s in found if s.kind is Kind.LAYER):
        layer = model.base.get_submodule(site.name)
        convolves = isinstance(layer, _ConvNd)
        groups, turned = (layer.groups, layer.transposed) if convolves else (1, False)
        rank = -(-r // groups)
        for name in site.parameters:
            if "bias" in name or tensors[name].dim() < 2 or used[name] > 1:
                continue
            rows, columns, *kernel = tensors[name].shape
            if turned:  # (in, out / groups, ...)
                count += rank * (rows * math.prod(kernel) + columns * groups)
            else:  # (out, in / groups, ...)
                count += rank * (groups * columns * math.prod(kernel) + rows)
    return count


def _modulators(model: weft.MultiTaskModel) -> int:
    """A square and a length for each output where that is smaller than the weight, else it all."""
    sizes = {name: p.numel() for name, p in model.base.named_parameters()}
    found = sites(model.base)
    used = Counter(n for s in found for n in s.parameters)
    count = _sizes(model, _norms(model))
    for site in (s for s in found if s.kind in (Kind.LAYER, Kind.DEPTHWISE)):
        if any(used[name] > 1 for name in site.parameters):
            continue
        layer = model.base.get_submodule(site.name)
        grouped = isinstance(layer, _ConvNd) and (layer.groups > 1 or layer.transposed)
        plain = isinstance(layer, (_ConvNd, nn.Linear)) and not grouped
        for name in site.parameters:
            square = len(layer.weight) ** 2 if plain and name.endswith("weight") else sizes[name]
            count += square + len(layer.weight) if square < sizes[name] else sizes[name]
    return count


FORMULAS = {
    "linear_probe": lambda _: 0,
    "bias_only": lambda m: _sizes(m, _vectors_called_bias(m)),
    "scale_bias": lambda m: _sizes(m, _norms(m)),
    "depthwise_patch": lambda m: _sizes(m, _depthwise(m) | _norms(m)),
    "lora": _two_factors,
    "rcm": _modulators,
    "bora": lambda m: _two_factors(m, 16),
    "taps": lambda m: _sizes(m, _open_layers(m) | _norms(m)),
    "hard_sharing": _private_end,
    "adashare": lambda m: 2 * _blocks(m),
    "dynashare": lambda m: 2 * _blocks(m),
    "disparse": lambda _: 0,
    "paco": lambda m: 5 + _sizes(m, _norms(m)),
    "full_finetune": lambda m: sum(p.numel() for p in m.base.parameters()),
}


@cases(Law.LEDGER_IS_EXACT)
def test_a_models_memory_follows_its_ledgers(case: Case) -> None:
    base = case.base.make()
    model = case.trained(base)
    for task in model.task_names:
        model.harden(task)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [
        *model.parameters(), *model.buffers()]}  # fmt: skip
    trained = sum(t.numel() * t.element_size() for t in model.shared_trainable().values())
    statistics = sum(
        t.numel() * t.element_size()
        for n, t in named_tensors(model.base)
        if n in model.sharing.train_shared and not isinstance(t, nn.Parameter)
    )
    statistics += sum(t.numel() * t.element_size() for t in model.shared.buffers())
    user = {t.untyped_storage().data_ptr() for t in [*base.parameters(), *base.buffers()]}
    of_model = sum(size for pointer, size in storages.items() if pointer not in user)
    ledgers = [model.ledger(t) for t in model.task_names]
    expected = sum(led.own_bytes + led.head_bytes for led in ledgers) + trained + statistics
    assert of_model == expected
    assert torch.equal(torch.tensor(of_model), torch.tensor(expected))
