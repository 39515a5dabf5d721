"""What becomes a verdict: the effect against its spread over the seeds."""

import json
import math

import numpy as np
import pytest

from models.experiments import runs, verdicts


@pytest.mark.parametrize(
    ("effects", "outcome"),
    [
        ([1.0, 1.2, 1.4], verdicts.HELD),
        ([-1.0, -1.2, -1.4], verdicts.DID_NOT_HOLD),
        ([0.1, 1.0, 2.0], verdicts.UNDECIDED),
        ([-0.1, 0.1, 0.0], verdicts.UNDECIDED),
        ([5.0], verdicts.UNDECIDED),
        ([1.0, 1.1, None], verdicts.UNDECIDED),
        ([None, None], verdicts.UNDECIDED),
        ([0.0, 0.0], verdicts.DID_NOT_HOLD),
    ],
)
def test_an_effect_holds_where_it_is_larger_than_its_spread(effects, outcome):
    assert verdicts.judge("it works", effects, "more").outcome == outcome


@pytest.mark.parametrize(
    ("factors", "least", "outcome"),
    [
        ([20.0, 25.0, 30.0], 10, verdicts.HELD),
        ([4.0, 5.0, 6.0], 10, verdicts.DID_NOT_HOLD),
        ([4.0, 5.0, 6.0], 1, verdicts.HELD),
        ([8.0, 11.0, 13.0], 10, verdicts.UNDECIDED),
        ([4.0, 5.0, None], 1, verdicts.UNDECIDED),
    ],
)
def test_a_factor_is_measured_against_what_is_claimed(factors, least, outcome):
    assert verdicts.judge_factor("it is faster", factors, "times", least).outcome == outcome


def test_a_verdict_says_its_numbers_and_their_spread():
    verdict = verdicts.judge_factor("it is faster", [2.0, 8.0, 4.0], "Steps", 1)
    assert verdict.numbers == "Steps: 4 (2 to 8 over 3 seeds)."


def test_a_cell_says_where_seeds_are_missing():
    assert verdicts.spread([1.0, None, 3.0]) == "2 (1 to 3), 2 of 3 seeds"
    assert verdicts.spread([None, None]) == "never"


def test_results_are_short_and_hold_no_nan():
    found = runs.plain({"a": [np.float32(1 / 3), math.nan, np.int64(3)], 5: (True, None, np.array([math.inf, 2.0]))})
    assert json.dumps(found, allow_nan=False) == '{"a": [0.33333, null, 3], "5": [true, null, [null, 2.0]]}'
