"""Who may come through the join door, and for how long; a lag is never told shorter than it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.cluster.attempts import MAX_OF_ADDRESS, MAX_OF_ALL, Attempts
from broker.cluster.joiners import SILENCE_S, Joiners
from broker.cluster.tokens import MAX_TOKENS, Tokens
from broker.heartbeats.lag import EXACT, SAMPLE_S, THIN_AT, HeadClock
from pmgsync.errors import MembershipError, TooManyAttemptsError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


ONE, OTHER = b"1" * 32, b"2" * 32


def test_a_token_is_good_for_a_time_and_for_whoever_has_used_it() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    first, second, bound = tokens.issue(60), tokens.issue(60), tokens.issue(60, key=ONE)
    assert [tokens.problem(first, key) for key in (ONE, OTHER)] == ["", ""]
    tokens.use(first.lower() + "\n", ONE)
    assert tokens.problem(first, ONE) == "", "an interrupted join is taken up with the same token"
    assert "another node" in tokens.problem(first, OTHER)
    assert "another node" in tokens.problem(bound, OTHER)
    assert "unknown" in tokens.problem("A" * 26, ONE)
    clock.now += 61
    assert all("expired" in tokens.problem(token, ONE) for token in (first, second, bound))
    for ttl in (0, 1e9):
        with pytest.raises(MembershipError):
            tokens.issue(ttl)


def test_so_many_tokens_are_open_at_once() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    for _ in range(MAX_TOKENS):
        tokens.issue(60)
    with pytest.raises(MembershipError, match="open already"):
        tokens.issue(60)
    clock.now += 61
    first = tokens.issue(50)
    tokens.use(first, ONE)
    for _ in range(MAX_TOKENS - 1):
        tokens.issue(60)
    tokens.issue(60)  # in the place of the one that was used
    assert "unknown" in tokens.problem(first, ONE)
    with pytest.raises(MembershipError, match="open already"):
        tokens.issue(60)
    clock.now += 61
    tokens.issue(60)


def test_whoever_guesses_waits_longer_and_is_then_not_heard() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    delays = []
    for _ in range(MAX_OF_ADDRESS):
        attempts.check("192.0.2.1")
        delays.append(attempts.wrong("192.0.2.1"))
    assert delays == sorted(delays)
    assert delays[0] < delays[-1]
    with pytest.raises(TooManyAttemptsError, match=r"192\.0\.2\.1"):
        attempts.check("192.0.2.1")
    attempts.check("192.0.2.2")
    clock.now += 61
    attempts.check("192.0.2.1")


def test_guessing_from_many_addresses_closes_the_door_for_all() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    for number in range(MAX_OF_ALL):
        attempts.check(f"2001:db8::{number:x}")
        attempts.wrong(f"2001:db8::{number:x}")
    with pytest.raises(TooManyAttemptsError, match="closed"):
        attempts.check("192.0.2.1")
    clock.now += 61
    attempts.check("192.0.2.1")


def test_a_joining_node_that_falls_silent_is_named_and_one_that_speaks_is_not() -> None:
    clock = Clock()
    joiners = Joiners(clock)
    joiners.expect({3, 4})
    clock.now += SILENCE_S - 1
    joiners.heard(3)
    joiners.tell(3, {"phase": "rows", "bytes": 10, "rows": -1, "bytes_total": "much"})
    clock.now += 2
    joiners.expect({3, 4})
    assert joiners.silent() == [4]
    assert joiners.progress(3) == {"phase": "rows", "bytes": 10, "rows": 0, "bytes_total": 0}
    joiners.expect({3})
    assert joiners.silent() == []
    joiners.expect(set())
    assert joiners.progress(3) is None


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


def test_a_head_that_never_rests_takes_little_memory_and_old_lags_are_told_nearly_right() -> None:
    clock, day_s = HeadClock(), 24 * 3600
    for tick in range(10 * day_s):
        clock.note(tick / 10, 1, tick)
    for lag_s in (1, 10, 60, 600, 6_000, 80_000):
        told = clock.lag_s(day_s, 10 * (day_s - lag_s))
        assert lag_s - 2 * SAMPLE_S <= told <= lag_s * (1 + 3 * EXACT) + 2 * SAMPLE_S
    assert len(clock._times) <= THIN_AT


class Disk:
    data: bytes | None = None

    def tokens(self) -> bytes | None:
        return self.data

    def store_tokens(self, data: bytes) -> None:
        self.data = data


def test_a_token_outlives_the_broker_that_gave_it_out_and_no_more_than_that() -> None:
    clock, wall, disk = Clock(), Clock(), Disk()
    tokens = Tokens(clock, disk, wall=wall)
    used, unused = tokens.issue(100), tokens.issue(100)
    tokens.use(used, ONE)
    assert disk.data is not None
    assert used.encode() not in disk.data, "nothing secret is on disk"
    for away_s, back_s in ((50.0, 0.0), (0.0, 3600.0)):
        now, later = Clock(), Clock()
        now.now, later.now = 5.0, wall.now + away_s - back_s
        again = Tokens(now, disk, wall=later)
        assert [again.problem(token, ONE) for token in (used, unused)] == ["", ""]
        assert "another node" in again.problem(used, OTHER)
        now.now += 101 - away_s
        assert "expired" in again.problem(unused, ONE), "not even when the clock was set back meanwhile"
    for damaged in (b"", b"\x93\x01\x02\x03", b"\x93\x01\xc0\x90", disk.data[:-3], b"\xff" * 20):
        disk.data = damaged
        assert "unknown" in Tokens(clock, disk).problem(unused, ONE)
