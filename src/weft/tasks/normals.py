"""A surface normal per pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor

from weft.core.options import Options
from weft.core.task import Metric, Task
from weft.errors import ConfigError, DataError

from .dense import at_target, check_map
from .heads import DENSE_HEADS, DenseHead, MakeDense
from .metrics import MeanOf, OnPairs, ShareOf

Encoding = Literal["decoded", "adashare"]
"""Unit vectors, or the 8-bit values of their pictures taken for vectors."""


@final
@dataclass(frozen=True)
class KnownNormals:
    """Chooses the pixels whose normal is known.

    Args:
        encoding: "decoded": vectors, or integers that are decoded by ``2 x / 255 - 1``, known where
            their length is nearer to 1 than one half. "adashare": raw values 0..255, known where
            none is 255.
    """

    encoding: Encoding

    def __call__(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3) outputs and (n, 3) targets, of any length, from (rows, 3, H, W)."""
        resized = at_target(output, target)
        vectors = target.to(resized.dtype)
        if self.encoding == "adashare":
            known = (vectors != 255).all(1)
        else:
            if not target.is_floating_point():
                vectors = vectors * (2 / 255) - 1
            known = (torch.linalg.vector_norm(vectors, dim=1) - 1).abs() < 0.5
        return resized.movedim(1, -1)[known], vectors.movedim(1, -1)[known]


@final
@dataclass(frozen=True)
class CosineLoss:
    """One minus the mean cosine of outputs and targets; 0 where no pixel counts.

    Args:
        pairs: the pixels that count.
    """

    pairs: KnownNormals

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar in 0..2."""
        chosen, wanted = self.pairs(output, target)
        return (1 - F.cosine_similarity(chosen, wanted, dim=1)).sum() / max(1, len(wanted))


def angles(output: Tensor, target: Tensor) -> Tensor:
    """(n,): degrees in 0..180 between (n, 3) vectors; 90 where one of them is zero.

    As accurate near 0 and 180 as elsewhere, where an arc cosine is not. Source: Kahan, How Futile
    are Mindless Assessments of Roundoff in Floating-Point Computation?, 2006, section 12.
    """
    u, v = F.normalize(output, dim=1), F.normalize(target, dim=1)
    across, along = torch.linalg.vector_norm(u - v, dim=1), torch.linalg.vector_norm(u + v, dim=1)
    return torch.rad2deg(2 * torch.atan2(across, along))


@final
@dataclass(frozen=True)
class AngleAtMost:
    """Whether vectors differ by an angle of at most so many degrees.

    Args:
        degrees: in 0..180.
    """

    degrees: float

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """(n,) booleans, from (n, 3) vectors."""
        return angles(output, target) <= self.degrees


@final
class MedianAngle(torchmetrics.Metric):
    """The median over all pairs of their angle in degrees, to 0.01 of a degree.

    Angles are counted in bins of 0.01 of a degree, so that any number of pixels fits in memory.
    """

    higher_is_better = False
    full_state_update = False
    counts: Tensor
    BINS_PER_DEGREE = 100

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(180 * self.BINS_PER_DEGREE + 1, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in (n, 3) vectors."""
        found = angles(output, target).nan_to_num(180.0)  # what is no number is wrong
        bins = (found * self.BINS_PER_DEGREE).long()
        self.counts += torch.bincount(bins, minlength=len(self.counts))

    def compute(self) -> Tensor:
        """The middle angle, or the mean of the two middle ones; NaN if there was no pair."""
        seen = self.counts.cumsum(0)
        count = int(seen[-1])
        if not count:
            return torch.tensor(float("nan"))
        middle = torch.tensor([(count - 1) // 2, count // 2], device=seen.device)
        bins = torch.searchsorted(seen, middle, right=True)
        return (bins + 0.5).mean() / self.BINS_PER_DEGREE


@final
@dataclass(frozen=True)
class CheckNormals:
    """Refuses targets that are no normals in the encoding.

    Args:
        encoding: "decoded" or "adashare".
    """

    encoding: Encoding

    def __call__(self, output: Tensor, target: Tensor) -> None:
        """Look at the targets of one batch.

        Raises:
            DataError: says what is wrong with them.
        """
        check_map(output, target)
        if not target.numel():
            return
        if self.encoding == "adashare":
            if target.min() < 0 or 0 < target.max() <= 1:
                raise DataError(
                    "Normals in AdaShare's space are raw values 0..255 with 255 where unknown, "
                    f"found {float(target.min()):g}..{float(target.max()):g}. Give the pictures' "
                    "values as they are, or encoding='decoded' for unit vectors."
                )
        elif target.is_floating_point():
            if bool((target.abs() > 1.01).any()):
                raise DataError(
                    "Normals are unit vectors with components in -1..1, or integers 0..255 that "
                    f"are decoded; found floats up to {float(target.nan_to_num().abs().max()):g}. "
                    "Keep pictures as integers, mark unknown pixels by zeros, or give "
                    "encoding='adashare'."
                )
        elif target.min() < 0 or target.max() > 255:
            raise DataError(
                "Normals as integers are 8-bit values 0..255, found "
                f"{int(target.min())}..{int(target.max())}."
            )


def SurfaceNormals(*, encoding: Encoding = "decoded", head: DenseHead = "conv") -> Task:
    """A surface normal per pixel: one minus the mean cosine where the normal is known.

    Args:
        encoding: "decoded": targets are unit vectors, or the integers 0..255 of a picture, decoded
            by ``2 x / 255 - 1``. Pixels whose vector is far from unit length are unknown: zeros,
            NaN, and in pictures black, grey and white. "adashare": targets are the values 0..255
            themselves, taken for vectors, unknown where one is 255 (below).
        head: "conv" is one 1x1 convolution, "aspp" four dilated branches (see `DilatedBranches`).

    Returns:
        The task; targets have shape (rows, 3, H, W). Outputs are (rows, 3, h, w) at the resolution
        of the features, of any length; loss and metrics resize them bilinearly to the targets.
        Metrics of the angle in degrees, over all known pixels of the set: "mean_angle",
        "median_angle" (to 0.01), and the shares "within_11.25", "within_22.5", "within_30".

    Raises:
        ConfigError: an option that cannot work.

    Differs from AdaShare's code, and all that is built on it, which does not decode the pictures:
    all its normals lie in one octant, where random pairs are about half as far apart. Its angles
    compare with ``encoding="adashare"`` only, and with nothing else. It also trains at the
    resolution of the features against the nearest targets.
    """
    given = Options("SurfaceNormals", ConfigError)
    given.word("encoding", encoding, ("decoded", "adashare"))
    given.word("head", head, DENSE_HEADS)
    pairs = KnownNormals(encoding)
    metrics: dict[str, Metric] = {
        "mean_angle": OnPairs(pairs, MeanOf(angles)),
        "median_angle": OnPairs(pairs, MedianAngle()),
    }
    for degrees in (11.25, 22.5, 30.0):
        metrics[f"within_{degrees:g}"] = OnPairs(pairs, ShareOf(AngleAtMost(degrees)))
    return Task(
        head=MakeDense(3, head),
        loss=CosineLoss(pairs),
        metric=metrics,
        check=CheckNormals(encoding),
        spec={"kind": "surface_normals", "encoding": encoding, "head": head},
    )
