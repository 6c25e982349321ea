"""The Accelerator of a run: device, precision, processes and trackers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType

from weft.errors import ConfigError

from .history import Row

# Which parameters a step uses can differ between phases; buffers are not one for all processes,
# because each normalises its own part of a batch.
PROCESSES = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)


def own_accelerator(precision: str, trackers: Sequence[str], log: Path | None) -> Accelerator:
    """An Accelerator for one run.

    Args:
        precision: "no", "fp16" or "bf16".
        trackers: names of Accelerate's trackers.
        log: the history's file, next to which trackers write; default the folder "runs".

    Returns:
        The Accelerator.

    Raises:
        ConfigError: the precision or a tracker is unknown or not available.
    """
    folder = log.parent if log is not None else Path("runs")
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=list(trackers) or None,
            project_dir=str(folder) if trackers else None,
            kwargs_handlers=[PROCESSES],
        )
    except ValueError as error:
        raise ConfigError(
            f"Accelerate cannot start with precision={precision!r} and trackers="
            f"{list(trackers)}: {error} One process uses one precision: start a new one, or "
            "give fit an accelerator."
        ) from error
    ready = [str(t) for t in accelerator.log_with]
    for tracker in trackers:
        if tracker not in (*ready, "all"):
            raise ConfigError(
                f"The tracker '{tracker}' is not installed. Run: pip install {tracker}"
            )
    check_accelerator(accelerator)
    return accelerator


def given_accelerator(
    accelerator: Accelerator, precision: str, trackers: Sequence[str]
) -> Accelerator:
    """The user's own Accelerator, once it is known to do what was asked for.

    Args:
        accelerator: the user's.
        precision: of `fit`.
        trackers: of `fit`.

    Returns:
        The same Accelerator.

    Raises:
        ConfigError: what was asked for is the Accelerator's business, or it cannot train this.
    """
    if trackers:
        raise ConfigError(
            "An accelerator has trackers of its own, which fit logs to: Accelerator(log_with=...) "
            "and accelerator.init_trackers(...). Leave out fit(trackers=...)."
        )
    if precision not in ("no", accelerator.mixed_precision):
        raise ConfigError(
            f"precision={precision!r} differs from the accelerator's "
            f"'{accelerator.mixed_precision}'. Leave it out."
        )
    ddp = accelerator.ddp_handler
    if accelerator.num_processes > 1 and (
        ddp is None or not ddp.find_unused_parameters or ddp.broadcast_buffers
    ):
        raise ConfigError(
            "With several processes fit needs Accelerator(kwargs_handlers=[DistributedDataParallel"
            "Kwargs(find_unused_parameters=True, broadcast_buffers=False)])."
        )
    check_accelerator(accelerator)
    return accelerator


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse ways of training that would not do what `fit` says.

    Raises:
        ConfigError: says which setting is in the way.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if launched > 1 and accelerator.num_processes == 1:
        raise ConfigError(
            f"{launched} processes were started, but each would train alone: Accelerate joins "
            "processes on CPU only where it is told to. Set ACCELERATE_USE_CPU=true."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"Accelerate is set to gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps}. Set it to 1 and use fit(accumulate=...)."
        )
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharded:
        raise ConfigError(
            f"fit trains over DistributedDataParallel, found {accelerator.distributed_type}. "
            "Start the processes with torchrun, or accelerate launch --multi_gpu."
        )


@contextmanager
def tracked(
    accelerator: Accelerator, trackers: Sequence[str], config: Mapping[str, Any]
) -> Iterator[None]:
    """Start trackers, and close them at the end of the block.

    Args:
        accelerator: of the run.
        trackers: their names; none leaves a given accelerator's own alone.
        config: what to log at the start.
    """
    if not trackers:
        yield
        return
    accelerator.init_trackers("weft", config={k: str(v) for k, v in config.items()})
    try:
        yield
    finally:
        # Not end_training(): that also ends the group of processes.
        for tracker in accelerator.trackers:
            tracker.finish()


def flat(rows: Mapping[str, Row]) -> dict[str, float]:
    """Rows as the flat numbers that trackers take."""
    numbers: dict[str, float] = {}
    for task, row in rows.items():
        values = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        values |= {f"val/{k}": v for k, v in row["val"].items()}
        numbers |= {f"{task}/{k}": float(v) for k, v in values.items()}
    return numbers
