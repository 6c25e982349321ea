"""The laws for options of TAPS and hard sharing that make other plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from laws.variants import ISOLATED, LAWS, OF_PATCHES, Variant, name_of, variants

# The methods themselves meet every base; their options meet those that differ most.
BASES = ("convolutions", "residual", "tied", "attention", "recurrent", "custom")


def on_these(method: str, **options: Any) -> list[Variant]:
    return [v for v in variants(method, **options) if v.base.name in BASES]


FROZEN = [
    *on_these("taps", form="residual"),
    *on_these("taps", budget=0.9),
    *on_these("taps", charge="parameters"),
]
TRAINED = [
    *on_these("taps", joint=True),
    *on_these("hard_sharing", own="nothing", batchnorm="follow"),
    *on_these("hard_sharing", own="nothing"),
]


@pytest.mark.parametrize("law", LAWS + OF_PATCHES, ids=name_of)
@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_plans_over_a_frozen_base_keep_the_laws(case: Variant, law: Callable[..., None]) -> None:
    law(case)


@pytest.mark.parametrize("law", [w for w in LAWS if w not in ISOLATED] + OF_PATCHES, ids=name_of)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_plans_that_train_the_base_keep_the_laws(case: Variant, law: Callable[..., None]) -> None:
    law(case)
