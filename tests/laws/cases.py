"""Every registered method on every base, and tasks that look as if they had been trained."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import weft
from laws.bases import BASES, REAL, TINY, Base
from weft.registry import METHODS, Law, options_of

# What a method needs of a base, and what its refusal says otherwise. A method that is not here
# takes any base with layers.
NEEDS = {
    "scale_bias": ("norm", "this base has none. Try bias_only or taps"),
    "depthwise_patch": ("depthwise", "this base has none. Try scale_bias or taps"),
    "adashare": ("blocks", "this base has none that it can"),
    "dynashare": ("blocks", "this base has none that it can"),
}
# Methods that insert adapters: PyTorch's functional call has no word for these, and folding may
# drop modules.
INSERTING = ("adashare", "bora", "dynashare", "lora")


@dataclass(frozen=True)
class Case:
    """A method on a base."""

    method: str
    base: Base

    def __str__(self) -> str:
        return f"{self.method}-{self.base.name}"

    def plan(self, base: nn.Module) -> weft.Sharing:
        """The method's plan for a base, made from an example where the method asks for one."""
        looks = "example" in options_of(self.method)
        return weft.method(self.method, base, **{"example": self.base.inputs(2)} if looks else {})

    def model(self, base: nn.Module | None = None, **tasks: weft.Task) -> weft.MultiTaskModel:
        """A model with the given tasks (default: a, b of 3 classes and c of one number)."""
        base = self.base.make() if base is None else base
        model = weft.MultiTaskModel(
            base,
            self.plan(base),
            example=self.base.inputs(2),
            output=self.base.output,
        )
        three = {"a": weft.Classification(3), "b": weft.Classification(3), "c": weft.Regression()}
        for name, task in (tasks or three).items():
            model.add_task(name, task)
        return model

    def trained(self, base: nn.Module | None = None) -> weft.MultiTaskModel:
        """The same model as if it had been trained: nothing is at its start."""
        model = self.model(base)
        disturb(model)
        return model

    def excepted(self, law: Law) -> bool:
        """Whether the method's registration excepts it from a law."""
        return law in METHODS[self.method].exceptions


def supported(case: Case) -> bool:
    """Whether the method takes the base."""
    need = NEEDS.get(case.method)
    return need is None or need[0] in case.base.has


ALL = [Case(method, base) for method in METHODS for base in BASES]
REFUSED = [case for case in ALL if not supported(case)]


def cases(
    law: Law | None = None, bases: tuple[Base, ...] = BASES, *, insertions: bool = True
) -> pytest.MarkDecorator:
    """Parametrise a test over all methods that take a base and are not excepted from the law."""
    chosen = [
        case
        for case in ALL
        if supported(case)
        and case.base in bases
        and not (law and case.excepted(law))
        and (insertions or case.method not in INSERTING)
    ]
    return pytest.mark.parametrize("case", chosen, ids=str)


def disturb(model: weft.MultiTaskModel, seed: int = 1) -> None:
    """Move every own and trained tensor away from its start; close every second gate.

    The policy of task a is being learned; the others are fixed and skip every second block.
    """
    generator = torch.Generator().manual_seed(seed)
    for task in model.task_names:
        state = model.tasks[task]
        for key, tensor in state.own.items():
            move(key, tensor, generator)
        for i, key in enumerate(sorted(gates(model, task))):
            with torch.no_grad():
                state.own[key].fill_((0.05, 0.15)[(i + hash_of(task)) % 2])
        for i, key in enumerate(k for k in state.own if k.endswith(":execute")):
            block = key.removesuffix(":execute")
            with torch.no_grad():
                state.own[f"{block}:temperature"].fill_(task == "a")
                state.own[key].fill_((i + hash_of(task)) % 2 == 0)
                if f"{block}:gated" in state.own:
                    state.own[f"{block}:gated"].fill_(True)
    for key, tensor in model.shared_trainable().items():
        move(key, tensor, generator)


def hash_of(task: str) -> int:
    """A number that differs between the tasks of a test."""
    return sum(map(ord, task))


def gates(model: weft.MultiTaskModel, task: str) -> set[str]:
    """Keys of the scores of a task's gates."""
    state = model.tasks[task]
    return {
        key
        for name, patch in state.patches.items()
        if patch.gate_score(state.own) is not None
        for key in patch.keys(name)
        if isinstance(state.own[key], nn.Parameter) and state.own[key].dim() == 0
    }


def closed(model: weft.MultiTaskModel, task: str) -> set[str]:
    """Keys of tensors behind closed gates: declared to have a zero gradient."""
    state = model.tasks[task]
    shut = {key for key in gates(model, task) if float(state.own[key].detach()) < 0.1}
    return {
        key
        for name, patch in state.patches.items()
        if shut.intersection(patch.keys(name))
        for key in patch.keys(name)
        if key not in shut and isinstance(state.own[key], nn.Parameter)
    }


def move(key: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Add noise to a tensor that keeps variances positive; count on a counter."""
    with torch.no_grad():
        if not tensor.is_floating_point():
            if tensor.dim() == 0 and tensor.dtype != torch.bool:
                tensor += 3
            return
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        if "running_var" in key:
            tensor *= torch.exp(0.3 * noise)
        else:
            tensor += 0.1 * noise


def call(module: nn.Module, inputs: object) -> object:
    """A module on a batch: one tensor, or keyword inputs."""
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def features(output: object, base: Base) -> Tensor:
    """What heads read of a base's output."""
    return output if base.output is None else output[base.output]  # type: ignore[index,return-value]


def rows(inputs: object, which: list[int]) -> object:
    """Some rows of a batch."""
    if isinstance(inputs, dict):
        return {k: v[which] for k, v in inputs.items()}
    return inputs[which]  # type: ignore[index]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a module by name."""
    return {k: v.detach().clone() for k, v in [*module.named_parameters(), *module.named_buffers()]}


def assert_same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Two snapshots agree bit for bit."""
    assert before.keys() == after.keys()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert not changed, f"changed: {changed}"


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Two outputs agree within a tolerance relative to the largest value."""
    scale = max(float(expected.abs().max()), 1e-6)
    assert float((found - expected).abs().max()) <= tolerance * scale


__all__ = [
    "ALL", "BASES", "INSERTING", "METHODS", "NEEDS", "REAL", "REFUSED", "TINY", "Base", "Case",
    "Law", "assert_close", "assert_same_bits", "call", "cases", "closed", "disturb", "features",
    "rows", "snapshot", "supported",
]  # fmt: skip
