"""LoRA: each task adds a product of two thin matrices to the weights of layers.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of Large Language
Models", ICLR 2022, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

from torch import Tensor, nn

from weft.adapters.low_rank import LowRank, is_linear, takes
from weft.core.adapter import Insertion
from weft.core.options import Options, is_number, is_whole
from weft.core.patch import Patch
from weft.core.sharing import Sharing
from weft.core.sites import Kind, Site, named_tensors, sites
from weft.errors import PlanError
from weft.patches.low_rank import LowRankSum

from .targets import chosen, patterned

HOLDING = (Kind.LAYER, Kind.DEPTHWISE, Kind.EMBEDDING)
"""Modules that have a weight matrix."""


def lora(
    base: nn.Module,
    *,
    r: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    rslora: bool = False,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Sharing:
    """A task adds (alpha / r) B A to the weight of a layer, with B A of rank r.

    h = W x + (alpha / r) B A x. A starts at random and B at zero, so a new task is the base; both
    train and W does not. In a convolution A has its kernel, stride, padding and dilation, and B is
    1x1.

    Source: section 4.1; section 4.2 for which weights.

    Args:
        base: a module with linear layers, convolutions, attention or recurrent layers.
        r: the rank, 1 or more; of a grouped convolution, r / groups rounded up in each group.
        alpha: numerator of the factor; what works for one r then works for others.
        dropout: probability with which an input of A is dropped in training, in [0, 1).
        target: which layers, as in PEFT. A list: names, or what names end with after a dot. A
            string: a regular expression for the whole name, or "all-linear", the output layer
            included, which PEFT leaves out. Default: every linear layer, convolution, attention and
            recurrent layer, without depthwise convolutions.
        exclude: which of those are not, a list or a regular expression.
        rslora: whether the factor is alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
        init: how A starts: "kaiming", uniform within 1/sqrt(inputs), or "gaussian", with a
            deviation of 1/r.
        rank_pattern: other ranks, by regular expressions for the end of names.
        alpha_pattern: other numerators, likewise.

    Returns:
        The plan. Layers that were asked for and cannot be adapted are in its ``refused``, with the
        reason.

    Raises:
        PlanError: a wrong option, a name that no layer has, or nothing to adapt.

    Differs from the paper in that it adapts every layer by default, not the query and value
    projections of transformers alone; in that A starts uniform, as in the authors' code and in
    PEFT; and in convolutions, of which the paper does not speak.
    """
    _check("r", r, is_rank, "a rank of 1 or more")
    _check("alpha", alpha, is_numerator, "a number other than 0")
    given = Options("lora")
    given.number("dropout", dropout, "[0, 1)")
    given.switch("rslora", rslora)
    given.word("init", init, ("kaiming", "gaussian"))
    _check("target", target, _is_choice, 'names, a regular expression, "all-linear" or None')
    _check("exclude", exclude, _is_choice, "names, a regular expression or None")
    _check_pattern("rank_pattern", rank_pattern, is_rank, "a rank of 1 or more")
    _check_pattern("alpha_pattern", alpha_pattern, is_numerator, "a number other than 0")
    found = sites(base)
    wanted = _targeted(base, found, target, exclude)
    ranks = patterned(rank_pattern or {}, [s.name for s in wanted], "rank_pattern")
    alphas = patterned(alpha_pattern or {}, [s.name for s in wanted], "alpha_pattern")
    used = Counter(name for site in found for name in site.parameters)
    layers = {s.name for s in found if s.kind in HOLDING}
    tensors = dict(named_tensors(base))
    adapters: dict[str, Insertion] = {}
    patches: dict[str, Patch] = {}
    refused: dict[str, str] = {}
    for site in wanted:
        here = LowRank(ranks.get(site.name, r), alphas.get(site.name, alpha), dropout, rslora, init)
        weights = _matrices(site, tensors)
        if target is None and site.kind is Kind.DEPTHWISE:
            refused[site.name] = "depthwise: low rank costs more than the layer; name it in target="
        elif reason := _refusal(base, site, weights, used, tensors):
            refused[site.name] = reason
        elif _is_called(site, layers) and takes(base.get_submodule(site.name)):
            adapters[site.name] = here
        elif dropout:
            refused[site.name] = "its weight is used in other ways than x W, so dropout=0 only"
        else:
            patches |= dict.fromkeys(weights, LowRankSum(here.r, here.scale, init))
    if not adapters and not patches:
        raise PlanError(_nothing(refused))
    return Sharing(
        "lora",
        options={
            "r": r,
            "alpha": alpha,
            "dropout": dropout,
            "target": target if target is None or isinstance(target, str) else list(target),
            "exclude": exclude if exclude is None or isinstance(exclude, str) else list(exclude),
            "rslora": rslora,
            "init": init,
            "rank_pattern": dict(rank_pattern or {}),
            "alpha_pattern": dict(alpha_pattern or {}),
        },
        patches=patches,
        adapters=adapters,
        refused=refused,
    )


def _targeted(
    base: nn.Module,
    found: Sequence[Site],
    target: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> list[Site]:
    """The sites that are asked for."""
    names = [site.name for site in found]
    if target is None:
        mine = {s.name for s in found if s.kind in (Kind.LAYER, Kind.DEPTHWISE)}
    elif isinstance(target, str) and target.lower() == "all-linear":
        mine = {name for name in names if is_linear(base.get_submodule(name))}
    else:
        mine = _named(found, target, "target")
    left = _named(found, exclude, "exclude") if exclude else set()
    return [s for s in found if s.name in mine - left]


def _named(found: Sequence[Site], pattern: str | Sequence[str], option: str) -> set[str]:
    """The names that a pattern matches; attention brings its output projection, as in PEFT."""
    mine = chosen(pattern, [site.name for site in found], option)
    layers = [s.name for s in found if s.kind is Kind.LAYER]
    return mine | {name for name in layers if _inside(name, mine.intersection(layers))}


def _matrices(site: Site, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the weight matrices of a site.

    Args:
        site: the site.
        tensors: the base's, by name.
    """
    if site.kind not in HOLDING:
        return ()
    weights = (name for name in site.parameters if "bias" not in name.rpartition(".")[2])
    return tuple(n for n in weights if tensors[n].dim() > 1 and tensors[n].is_floating_point())


def _refusal(
    base: nn.Module,
    site: Site,
    weights: tuple[str, ...],
    used: Mapping[str, int],
    tensors: Mapping[str, Tensor],
) -> str:
    """Why a site cannot be adapted, or ""."""
    if site.refusal:
        return site.refusal
    if not weights:
        kind = type(base.get_submodule(site.name)).__name__
        return f"{kind} has no floating point weight matrix"
    if empty := [list(tensors[name].shape) for name in weights if not tensors[name].numel()]:
        return f"its weight has the shape {empty[0]}, so there is nothing to change"
    if any(used[name] > 1 for name in weights):
        return "its weight is tied to another layer's, which low rank here would part from it"
    return ""


def _is_called(site: Site, layers: set[str]) -> bool:
    """Whether a module is inside the base and no part of another layer, which would read it."""
    return bool(site.name) and not _inside(site.name, layers)


def _inside(name: str, others: set[str]) -> bool:
    """Whether a module is inside one of the others."""
    return any(not other or name.startswith(f"{other}.") for other in others if other != name)


def _nothing(refused: Mapping[str, str]) -> str:
    if not refused:
        return (
            "lora adapts linear layers, convolutions, embeddings, attention and recurrent layers, "
            "and this base has none that is asked for. Try bias_only or linear_probe."
        )
    first, reason = next(iter(refused.items()))
    more = f" ({len(refused)} layers were asked for in all)" if len(refused) > 1 else ""
    return f"lora can adapt no layer that is asked for. '{first}': {reason}{more}."


# -------------------------------------------------------------------------------- the options


def is_rank(value: object) -> bool:
    """Whether something is a whole number of 1 or more."""
    return is_whole(value, 1)


def is_numerator(value: object) -> bool:
    """Whether something is a finite number other than 0."""
    return is_number(value) and value != 0


def is_probability(value: object) -> bool:
    """Whether something is a number in [0, 1)."""
    return is_number(value) and 0.0 <= value < 1.0


def _is_choice(value: object) -> bool:
    names = isinstance(value, (Sequence, Set)) and all(isinstance(name, str) for name in value)
    return value is None or names


def _check(option: str, value: object, fits: Callable[[Any], bool], expected: str) -> None:
    if not fits(value):
        raise PlanError(f"lora({option}=...) is {expected}, found {value!r}.")


def _check_pattern(option: str, values: object, fits: Callable[[Any], bool], expected: str) -> None:
    if values is not None and not isinstance(values, Mapping):
        raise PlanError(f"lora({option}=...) is {{regular expression: value}}, found {values!r}.")
    for pattern, value in (values or {}).items():
        if not isinstance(pattern, str):
            raise PlanError(
                f"lora({option}=...) has regular expressions as keys, found {pattern!r}."
            )
        if not fits(value):
            raise PlanError(f"lora({option}=...): '{pattern}' has {expected}, found {value!r}.")
