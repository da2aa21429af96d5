"""Refusals: whoever is refused chooses how often and with which words, and neither log nor memory may grow with it."""

from __future__ import annotations

import errno
import logging

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from broker.net.handshakes import GONE, NO_CURVE, TOO_SLOW, WRONG_SERVER_KEY, failure, refusal
from broker.net.incoming import plain_address
from broker.net.log_limit import A_MINUTE
from broker.net.refusals import AGAIN_S, MAX_KNOWN, RECENT_S, Refusals
from cli.status import refused_lines


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_refusals_are_counted_by_port_address_and_reason_and_forgotten() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    for _ in range(3):
        refusals.note("control", "192.0.2.9", "its key is not a member's")
    refusals.note("events", "192.0.2.9", "its key is not a member's")
    clock.now += 10
    newest, older = refusals.recent()
    assert newest == {
        "port": "events", "address": "192.0.2.9", "reason": "its key is not a member's", "count": 1, "last_s": 10.0,
    }  # fmt: skip
    assert older["count"] == 3
    clock.now += RECENT_S
    assert refusals.recent() == []
    refusals.note("events", "192.0.2.9", "its key is not a member's")
    assert refusals.recent()[0]["count"] == 1, "what was forgotten is not counted on"


def test_neither_log_nor_memory_grow_with_a_flood(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    refusals = Refusals(clock)
    minutes = 10
    with caplog.at_level(logging.WARNING):
        for number in range(minutes * 1000):
            clock.now += 60 / 1000
            refusals.note("join", f"192.0.2.{number % 250}", f"reason {number}")
            refusals.note("join", "192.0.2.1", "the same again and again")
    assert len(refusals.recent()) <= MAX_KNOWN
    # Beside the lines themselves, one a minute says how many there were not.
    assert len(caplog.records) <= (minutes + 1) * (A_MINUTE + 1)
    assert any("action=refused-more" in record.getMessage() for record in caplog.records)


def test_what_lasts_is_logged_again_with_its_count(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    refusals = Refusals(clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(10 * round(AGAIN_S) + 1):
            refusals.note("events", "192.0.2.1", "x")
            clock.now += 1
    assert len(caplog.records) == 11
    assert f"count={AGAIN_S + 1:.0f} " in caplog.records[1].getMessage()


@given(st.integers(0, 2**32 - 1), st.sampled_from([*zmq.constants.Event]))
def test_every_event_has_a_sentence_at_both_ends(value: int, event: int) -> None:
    assert failure(event, value, "node2 (2) at 192.0.2.2:7671")
    assert isinstance(refusal(event, value), str)


def test_the_reasons_that_an_administrator_can_do_something_about_have_their_own_words() -> None:
    protocol, auth, other = (
        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    )  # fmt: skip
    mismatch, crypto = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH, zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
    assert refusal(protocol, mismatch) == NO_CURVE
    assert refusal(protocol, crypto) == WRONG_SERVER_KEY
    assert refusal(other, errno.EAGAIN) == TOO_SLOW
    assert refusal(other, errno.EPIPE) == GONE
    assert "not a member's there" in failure(auth, 400, "x")
    assert "status 500" in failure(auth, 500, "x")
    assert "does not use CURVE" in failure(protocol, mismatch, "x")
    assert "key may not be the one" in failure(other, errno.EPIPE, "x")
    assert "does not answer" in failure(other, errno.EAGAIN, "x")


def test_status_names_who_was_refused_and_cannot_be_written_to_by_him() -> None:
    status = {
        "nodes": [{"cid": 2, "name": "pmg2", "ip": "192.0.2.2"}],
        "refused": [
            {"port": "control", "address": "192.0.2.2", "reason": "x\x1b[2J", "count": 3, "last_s": 4.2},
            {"port": "join", "address": "", "reason": "y", "count": 1, "last_s": 5.0},
            *({"port": "key", "address": "192.0.2.9", "reason": "z", "count": 1, "last_s": 5.0} for _ in range(9)),
        ],
    }
    lines = refused_lines(status)
    assert lines[0].startswith("refused on port control: pmg2(2) at 192.0.2.2: x")
    assert lines[0].endswith("(3 times, last 4 s ago)")
    assert "\x1b" not in lines[0]
    assert "an address that is not known: y (5 s ago)" in lines[1]
    assert lines[-1] == "refused: 6 more, see --json"
    assert refused_lines({"nodes": []}) == []


def test_an_ipv4_address_is_shown_as_one() -> None:
    assert plain_address("::ffff:192.0.2.1") == "192.0.2.1"
    assert plain_address("2001:db8::1") == "2001:db8::1"
