"""Tokens are good once and for a time; a lag is never told shorter than it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.cluster.tokens import MAX_WRONG, Tokens
from broker.heartbeats.lag import SAMPLE_S, HeadClock
from pmgsync.errors import MembershipError, TokenExpiredError, TokenRefusedError, TooManyAttemptsError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_token_is_good_once_and_for_a_time() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    first, second = tokens.issue(60), tokens.issue(60)
    tokens.check(first)
    tokens.check(first)
    tokens.use(first.lower() + "\n")
    with pytest.raises(TokenExpiredError, match="used"):
        tokens.use(first)
    clock.now += 61
    with pytest.raises(TokenExpiredError, match="expired"):
        tokens.check(second)
    with pytest.raises(TokenRefusedError, match="does not know"):
        tokens.check("A" * 26)
    for ttl in (0, 1e9):
        with pytest.raises(MembershipError):
            tokens.issue(ttl)


def test_guessing_closes_the_door_for_a_while() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    good = tokens.issue(600)
    for _ in range(MAX_WRONG):
        with pytest.raises(TokenRefusedError):
            tokens.check("wrong")
    with pytest.raises(TooManyAttemptsError, match="too many"):
        tokens.use(good)
    clock.now += 61
    tokens.use(good)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5)), min_size=1, max_size=60), st.data())
def test_a_lag_is_never_told_too_short(steps: list[tuple[float, int]], data: st.DataObject) -> None:
    clock, now, lsn = HeadClock(), 0.0, 0
    reached: list[tuple[float, int]] = []
    for wait, grow in steps:
        now += wait
        lsn += grow
        clock.note(now, 1, lsn)
        reached.append((now, lsn))
    applied = data.draw(st.integers(0, lsn))
    true_lag = max((now - when for when, head in reached if head > applied), default=0.0)
    told = clock.lag_s(now, applied)
    assert true_lag - 1e-9 <= told
    assert told <= true_lag + 3 + 2 * SAMPLE_S
    assert clock.lag_bytes(applied) == lsn - applied
    assert clock.lag_s(now, lsn) == 0.0
