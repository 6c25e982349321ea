"""The laws for options of TAPS and hard sharing that make other plans."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from laws.variants import ISOLATED, LAWS, OF_PATCHES, Variant, name_of, variants

FROZEN = [
    *variants("taps", form="residual"),
    *variants("taps", budget=0.9),
    *variants("taps", charge="parameters"),
]
TRAINED = [
    *variants("taps", joint=True),
    *variants("hard_sharing", own="nothing", batchnorm="follow"),
    *variants("hard_sharing", own="nothing"),
]


@pytest.mark.parametrize("law", LAWS + OF_PATCHES, ids=name_of)
@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_plans_over_a_frozen_base_keep_the_laws(case: Variant, law: Callable[..., None]) -> None:
    law(case)


@pytest.mark.parametrize("law", [w for w in LAWS if w not in ISOLATED] + OF_PATCHES, ids=name_of)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_plans_that_train_the_base_keep_the_laws(case: Variant, law: Callable[..., None]) -> None:
    law(case)
