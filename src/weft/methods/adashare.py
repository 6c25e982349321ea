"""AdaShare: which blocks of one network does each task execute?

Sun, Panda, Feris, Saenko, "AdaShare: Learning What To Share For Efficient Deep Multi-Task
Learning", NeurIPS 2020, https://arxiv.org/abs/1911.12423.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from weft.adapters.block_policy import BlockPolicy, Draw
from weft.core.sharing import Sharing
from weft.core.sites import everything
from weft.penalties import PolicyForm

from .policies import Blocks, PolicyOptions, find_blocks, with_shortcuts


def adashare(
    base: nn.Module,
    *,
    example: Any = None,
    blocks: Blocks | None = None,
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
    retrain_from: Literal["start", "policy"] = "start",
    batchnorm: Literal["shared", "private"] = "shared",
) -> Sharing:
    """All tasks train one network, and each task executes or skips each of its residual blocks.

    With f the block's output and r what goes around its branch, training computes u f + (1 - u) r,
    where u is a soft Gumbel sample of the task's policy, one per forward. Three phases: all blocks
    execute; weights and policy train in turn, on disjoint parts of the data; the policy is drawn
    and the weights train again. A block that a task skips is not computed.

    Source: sections 3.2 to 3.4.

    Args:
        base: a module with residual blocks.
        example: one batch for the base, to find its blocks or to check those given.
        blocks: names of the blocks instead of all that are found; without an example, a mapping
            ``{block: shortcut}`` in the order in which they run, with the child that goes around
            the block's branch or "".
        sparsity: the price of executing blocks, >= 0.
        sharing: the price of executing other blocks than other tasks do, >= 0.
        losses: "paper", or the forms of the authors' "code"; see `weft.penalties`.
        warmup: share of the epochs before policies are learned, in [0, 1).
        retrain: share of the epochs after they are fixed, in (0, 1).
        curriculum: the share of policy learning after which all policies are learned, in [0, 1]. It
            begins with the last block; the others execute until it is their turn.
        temperature: of the samples, in the first and the last epoch of policy learning, > 0;
            geometric between.
        policy_data: share of the training data on which policies are learned, in (0, 1); weights
            train on the rest meanwhile.
        policy_lr: factor on the learning rate for policies.
        evaluation: while policies are learned, scores are of the "likely" choice for each block, or
            of a "sample".
        final: the policy is drawn ("sample") or each block's "likely" choice is taken.
        seed: of the drawing.
        retrain_from: "start" trains the weights anew; "policy" goes on from what they have become.
        batchnorm: "private" gives each task batch normalisations of its own.

    Returns:
        The plan. Tasks train together.

    Raises:
        PlanError: a wrong option, no residual blocks, or a block that is none.

    Differs from the paper in that curriculum and temperature are relative to the length of policy
    learning, since an epoch here is one cycle of both turns; that policies take no weight decay;
    and that blocks skipped by a fixed policy are not computed in training either, so that their
    running statistics see only the tasks that execute them.
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
    options.check("adashare")
    found = find_blocks("adashare", base, example, blocks)
    patches = options.patches(base)
    policies = {site: BlockPolicy(block.shortcut, evaluation) for site, block in found.items()}
    return Sharing(
        "adashare",
        options=options.plain(found),
        patches=patches,
        adapters=with_shortcuts(policies, found),
        train_shared=everything(base) - patches.keys(),
        penalties=options.penalties(tuple(found)),
        phases=options.phases(tuple(found), charged=False),
        groups=options.groups(),
    )
