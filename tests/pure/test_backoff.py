"""Pauses: they grow to the longest and no further, begin anew after a success, and jitter never makes them grow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.backoff import Backoff

SECONDS = st.floats(0.001, 1000)


@given(SECONDS, SECONDS, st.floats(1, 10), st.lists(st.booleans(), max_size=60))
def test_pauses_grow_until_a_success(first: float, longest: float, factor: float, successes: list[bool]) -> None:
    backoff = Backoff(first, longest, factor=factor)
    last = None
    for success in successes:
        if success:
            backoff.succeeded()
            last = None
            continue
        announced = backoff.pause_s
        pause = backoff.failed()
        assert pause == announced
        assert pause == (min(first, longest) if last is None else min(last * factor, longest))
        last = pause


@given(SECONDS, SECONDS, st.lists(st.floats(0.5, 1.5), min_size=1, max_size=40))
def test_jitter_is_of_each_pause_alone(first: float, longest: float, jitters: list[float]) -> None:
    left = iter(jitters)
    with_jitter, without = Backoff(first, longest, jitter=lambda: next(left)), Backoff(first, longest)
    for jitter in jitters:
        assert with_jitter.failed() == without.failed() * jitter
