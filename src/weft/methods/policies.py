"""Policies over residual blocks: what AdaShare and DynaShare have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from weft.adapters.block_policy import Draw, KeptOutput
from weft.core.adapter import Insertion
from weft.core.blocks import ResidualBlock, residual_blocks
from weft.core.options import Options, is_number
from weft.core.patch import Patch
from weft.core.sharing import Group, Penalty, Phase, Turn
from weft.errors import PlanError
from weft.penalties import PolicyForm, PolicySharing, PolicySparsity

from .hard_sharing import private_batchnorm
from .policy_course import ExecuteAll, FixPolicies, LearnPolicies

FIXED = ("*:logits", "*:temperature", "*:execute", "*:gated")
"""Patterns of the keys that a policy is made of."""

Blocks = Iterable[str] | Mapping[str, str]
"""Sites of residual blocks; as a mapping, with the child that goes around the branch or ""."""


# ------------------------------------------------------------------------------- the network


def find_blocks(
    method: str, base: nn.Module, example: Any, blocks: Blocks | None
) -> dict[str, ResidualBlock]:
    """The blocks that a plan is about, in the order in which they run.

    Raises:
        PlanError: there are none, or what was given does not tell.
    """
    if blocks is not None and not isinstance(blocks, Mapping):
        what = "names of blocks, or {block: shortcut}"
        blocks = Options(method).names("blocks", blocks, what)
    if example is not None:
        found = residual_blocks(base, example, blocks)
    elif isinstance(blocks, Mapping):
        found = {site: ResidualBlock(shortcut, 0, 1) for site, shortcut in blocks.items()}
    else:
        raise PlanError(
            f"{method} finds residual blocks by running the base once: give it example=x, one "
            "batch for the base, or say which they are with blocks={block: shortcut}."
        )
    if not found:
        raise PlanError(
            f"{method} skips residual blocks, and this base has none that it can: modules with a "
            "layer whose output is their input, or what a child makes of it, plus a branch. Blocks "
            "that normalise the sum (post-norm) cannot be skipped. Try taps."
        )
    return found


def with_shortcuts(
    policies: Mapping[str, Insertion], found: Mapping[str, ResidualBlock]
) -> dict[str, Insertion]:
    """By site, the policies of blocks, and what keeps the outputs of their shortcuts."""
    shortcuts = {f"{site}.{b.shortcut}": KeptOutput() for site, b in found.items() if b.shortcut}
    return {**policies, **shortcuts}


# -------------------------------------------------------------------------------- the options


@dataclass(frozen=True)
class PolicyOptions:
    """How policies are learned; see `weft.adashare` for each option."""

    sparsity: float
    sharing: float
    losses: PolicyForm
    warmup: float
    retrain: float
    curriculum: float
    temperature: tuple[float, float]
    policy_data: float
    policy_lr: float
    evaluation: Draw
    final: Draw
    seed: int
    retrain_from: Literal["start", "policy"]
    batchnorm: Literal["shared", "private"]

    def check(self, method: str) -> None:
        """Refuse options out of range.

        Raises:
            PlanError: names the option.
        """
        given = Options(method)
        given.word("losses", self.losses, ("paper", "code"))
        given.word("evaluation", self.evaluation, ("likely", "sample"))
        given.word("final", self.final, ("likely", "sample"))
        given.word("retrain_from", self.retrain_from, ("start", "policy"))
        given.word("batchnorm", self.batchnorm, ("shared", "private"))
        given.number("sparsity", self.sparsity, "[0, inf)")
        given.number("sharing", self.sharing, "[0, inf)")
        given.number("policy_lr", self.policy_lr, "[0, inf)")
        given.number("warmup", self.warmup, "[0, 1)")
        given.number("retrain", self.retrain, "(0, 1)")
        given.number("curriculum", self.curriculum, "[0, 1]")
        given.number("policy_data", self.policy_data, "(0, 1)")
        given.seed("seed", self.seed)
        if not self.warmup + self.retrain < 1.0:
            raise PlanError(
                f"{method}(warmup=..., retrain=...) are shares of the epochs that leave some for "
                f"policies; found {self.warmup} and {self.retrain}."
            )
        pair = isinstance(self.temperature, Sequence) and len(self.temperature) == 2
        if not pair or not all(is_number(t) and t > 0.0 for t in self.temperature):
            raise PlanError(
                f"{method}(temperature=...) is two numbers > 0, for the first and the last epoch "
                f"of policy learning; found {self.temperature}."
            )

    def plain(self, found: Mapping[str, ResidualBlock]) -> dict[str, Any]:
        """The options as plain values, with the blocks that they are about."""
        return {"blocks": {site: b.shortcut for site, b in found.items()}, **asdict(self)}

    def patches(self, base: nn.Module) -> dict[str, Patch]:
        """What a task owns of the base: nothing, or all normalisations with running statistics."""
        return private_batchnorm(base) if self.batchnorm == "private" else {}

    def penalties(self, blocks: tuple[str, ...]) -> tuple[Penalty, ...]:
        """What policies are charged while they are learned."""
        return (
            PolicySparsity(self.sparsity, blocks, self.losses),
            PolicySharing(self.sharing, blocks, self.losses),
        )

    def groups(self) -> tuple[Group, ...]:
        """Policies learn at a rate of their own, and nothing pulls them to one half."""
        return (Group(match=("*:logits",), lr=self.policy_lr, decay=False),)

    def phases(self, blocks: tuple[str, ...], *, charged: bool) -> tuple[Phase, ...]:
        """Warm-up, policy learning, and training with fixed policies.

        Args:
            blocks: sites of the blocks, in the order in which they run.
            charged: whether the plan has penalties for the last phase.
        """
        split = 1.0 - self.policy_data
        first = Phase(
            "warm-up",
            share=self.warmup,
            freeze=("*:logits",),
            penalty=0.0,
            selectable=False,
            each_epoch=ExecuteAll(blocks),
        )
        learn = Phase(
            "policy",
            share=1.0 - self.warmup - self.retrain,
            turns=(
                Turn("weights", freeze=("*:logits",), penalty=0.0, data=(0.0, split)),
                Turn("policy", train=("*:logits",), heads=False, data=(split, 1.0)),
            ),
            selectable=False,
            each_epoch=LearnPolicies(blocks, self.curriculum, *self.temperature),
            transition=FixPolicies(blocks, self.final, self.seed),
        )
        again = Phase(
            "retrain",
            share=self.retrain,
            freeze=FIXED,
            penalty=1.0 if charged else 0.0,
            restart=self.retrain_from == "start",
        )
        return (first, learn, again) if self.warmup else (learn, again)
