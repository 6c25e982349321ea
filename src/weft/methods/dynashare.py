"""DynaShare: which blocks does each task execute, and for which inputs?

Rahimian, Javadi, Tung, Oliveira, "DynaShare: Task and Instance Conditioned Parameter Sharing for
Multi-Task Learning", 2023, https://arxiv.org/abs/2305.17305.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from torch import nn

from weft.adapters.block_policy import BlockPolicy, Draw
from weft.adapters.instance_gate import Decision, InstanceGate
from weft.core.adapter import Insertion
from weft.core.blocks import ResidualBlock
from weft.core.options import Options
from weft.core.sharing import Sharing
from weft.core.sites import everything
from weft.errors import PlanError
from weft.penalties import GateRate, PolicyForm

from .policies import (
    Blocks,
    PolicyOptions,
    find_blocks,
    with_shortcuts,
)


def dynashare(
    base: nn.Module,
    *,
    example: Any = None,
    blocks: Blocks | None = None,
    target: float | Sequence[float] = 0.55,
    rate: float = 25.0,
    decision: Decision = "argmax",
    sparsity: float = 0.05,
    sharing: float = 0.05,
    losses: PolicyForm = "paper",
    warmup: float = 0.1,
    retrain: float = 0.5,
    curriculum: float = 0.5,
    temperature: tuple[float, float] = (5.0, 0.2),
    policy_data: float = 0.2,
    policy_lr: float = 10.0,
    evaluation: Draw = "likely",
    final: Draw = "sample",
    seed: int = 0,
    retrain_from: Literal["start", "policy"] = "policy",
    batchnorm: Literal["shared", "private"] = "shared",
) -> Sharing:
    """AdaShare, and a gate per block, shared by all tasks, that skips it for single inputs.

    First policies are learned and fixed as in `adashare`; then weights and gates train. Where a
    task's policy executes a block with a target t < 1, the row's gate a is computed from the
    block's input (average, two layers, hard straight-through Gumbel sample), and the output is
    a f + (1 - a) r; a policy that skips wins over the gate. Gates are charged rate * 1/L sum_l
    (t_l - mean a_l)^2 per task. In eval mode a block computes only the rows that execute it.

    Source: section 3.

    Args:
        base: a module with residual blocks.
        example: one batch for the base, to find its blocks and the sizes of their inputs.
        blocks: names of the blocks instead of all that are found.
        target: the share of inputs that execute a block where the policy does, in (0, 1]; for each
            block in the order in which they run, or one number for the second half of them and 1
            for the first. Blocks with target 1 have no gate.
        rate: the price of gates that miss their targets, >= 0.
        decision: in eval mode gates take the likelier way ("argmax"), or are drawn ("sample").
        sparsity: as in `adashare`, like all that follow.
        sharing: as there.
        losses: as there.
        warmup: as there.
        retrain: as there; gates train in this phase.
        curriculum: as there.
        temperature: as there, of policies; that of gates is 1.
        policy_data: as there.
        policy_lr: as there.
        evaluation: as there.
        final: as there.
        seed: as there.
        retrain_from: as there; gates are learned on top of what policy learning left.
        batchnorm: as there; those of gates are shared.

    Returns:
        The plan. Tasks train together. Blocks that no gate can divide by rows are in ``refused``,
        with the reason; they have a policy only.

    Raises:
        PlanError: a wrong option, no residual blocks, or a block that is none.

    Differs from the paper's code in that the gates average over the whole map, that they decide
    deterministically in eval mode, and that gates of blocks that a task skips are neither computed
    nor charged.
    """
    options = PolicyOptions(
        sparsity=sparsity,
        sharing=sharing,
        losses=losses,
        warmup=warmup,
        retrain=retrain,
        curriculum=curriculum,
        temperature=temperature,
        policy_data=policy_data,
        policy_lr=policy_lr,
        evaluation=evaluation,
        final=final,
        seed=seed,
        retrain_from=retrain_from,
        batchnorm=batchnorm,
    )
    options.check("dynashare")
    Options("dynashare").number("rate", rate, "[0, inf)")
    Options("dynashare").word("decision", decision, ("argmax", "sample"))
    if example is None:
        raise PlanError(
            "dynashare sizes its gates by running the base once: give it example=x, one batch for "
            "the base."
        )
    found = find_blocks("dynashare", base, example, blocks)
    targets = _targets(target, found)
    gated = {site: t for site, t in targets.items() if t < 1.0 and not found[site].indivisible}
    patches = options.patches(base)

    def insertion(site: str, block: ResidualBlock) -> Insertion:
        if site not in gated:
            return BlockPolicy(block.shortcut, evaluation)
        channels, dim = block.channels, block.channel_dim
        return InstanceGate(channels, dim, block.shortcut, evaluation, decision)

    policies = {site: insertion(site, block) for site, block in found.items()}
    return Sharing(
        "dynashare",
        options={
            **options.plain(found),
            "target": tuple(targets.values()),
            "rate": rate,
            "decision": decision,
        },
        patches=patches,
        adapters=with_shortcuts(policies, found),
        train_shared=everything(base) - patches.keys(),
        penalties=(
            *options.penalties(tuple(found)),
            GateRate(rate, tuple(gated.items()), len(found)),
        ),
        phases=options.phases(tuple(found), charged=True),
        groups=options.groups(),
        refused={
            site: f"no gate by input: {found[site].indivisible}"
            for site, t in targets.items()
            if t < 1.0 and site not in gated
        },
    )


def _targets(target: float | Sequence[float], found: dict[str, ResidualBlock]) -> dict[str, float]:
    """By block, the share of inputs that should execute it.

    Raises:
        PlanError: not one number per block, or none that a gate could meet.
    """
    count = len(found)
    several = isinstance(target, Iterable) and not isinstance(target, str) and np.ndim(target) > 0
    chosen: list[Any] = list(target) if isinstance(target, Iterable) and several else [target]
    for number in chosen:
        Options("dynashare").number("target", number, "(0, 1]", "or one for each block")
    if not several:
        chosen = [1.0] * (count // 2) + chosen * (count - count // 2)
    if len(chosen) != count:
        raise PlanError(
            f"dynashare(target=...) is one number, or one per block: found {len(chosen)} for "
            f"{count} blocks, {', '.join(found)}."
        )
    return dict(zip(found, chosen, strict=True))
