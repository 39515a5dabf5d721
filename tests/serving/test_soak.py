"""A server keeps answering while everything happens at once."""

import pytest

from tests.serving import soak

MEBIBYTE = 2**20


def check(outcome: soak.Outcome, seconds: int) -> None:
    assert outcome.failures == []
    assert outcome.answers["REST"] > 10 * seconds
    assert outcome.answers["gRPC"] > 2 * seconds
    assert outcome.answers["big"] >= 1 + seconds // 60
    assert outcome.swaps >= 1 + seconds // 60
    assert outcome.killed >= seconds // 4


def test_swaps_killed_clients_and_big_answers_at_once_fail_no_request():
    check(soak.soak(15), 15)


@pytest.mark.slow
def test_ten_minutes_of_it_neither_hold_up_the_health_check_nor_grow():
    outcome = soak.soak(600)
    check(outcome, 600)
    assert outcome.refused >= 15
    assert outcome.p99_ms() < 100
    assert outcome.growth() < 32 * MEBIBYTE, outcome.memory
