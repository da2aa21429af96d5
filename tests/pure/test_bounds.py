"""What bounds a peer that sends too much: allowances, the room of a call, refusals that are told once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.chains.streams import MESSAGE_FRAMES
from broker.members.calls import MAX_ATTACHMENTS, SLACK_BYTES, Attachments, Calls, End
from pmgsync.agent import refusals as refusals_module
from pmgsync.agent.refusals import Refusals
from pmgsync.core.allowance import MESSAGE_BYTES, Allowance
from pmgsync.errors import ProtocolError
from pmgsync.wire.local import MAX_PARTS


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 3000))))
def test_never_more_is_taken_than_time_makes_up_for(messages: list[tuple[float, int]]) -> None:
    now = 0.0
    allowance = Allowance(lambda: now, 1000, 2000)
    taken = 0
    for pause_s, size in messages:
        now += pause_s
        if allowance.takes(size):
            taken += size + MESSAGE_BYTES
        assert taken <= 2000 + now * 1000 + 1e-6


def test_an_allowance_comes_back() -> None:
    now = 0.0
    allowance = Allowance(lambda: now, 1000, 1000)
    assert allowance.takes(700)
    assert not allowance.takes(700)
    now = 1.0
    assert allowance.takes(700)
    assert not allowance.takes(10_000)


class Ends:
    """Both ends of calls: what was sent to each."""

    def __init__(self) -> None:
        self.caller: list[Mapping[str, Any]] = []
        self.server: list[Mapping[str, Any]] = []

    def to_caller(self, message: Mapping[str, Any], attachments: Attachments) -> bool:
        self.caller.append(message)
        return True

    def to_server(self, message: Mapping[str, Any], attachments: Attachments) -> bool:
        self.server.append(message)
        return True


def begun(credit: object) -> tuple[Calls, Ends]:
    calls, ends = Calls(lambda: 7), Ends()
    calls.begin(End("caller", ends.to_caller, 3), "server", ends.to_server, {"op": "call", "id": 3, "credit": credit})
    return calls, ends


DATA: dict[str, Any] = {"op": "data", "id": 7, "bytes": 0, "piece": {}}


@pytest.mark.parametrize("first_bytes", [0, 5000])
def test_a_server_that_ignores_credit_is_cut_off(first_bytes: int) -> None:
    calls, ends = begun(1 << 20)
    sent = 0
    with pytest.raises(ProtocolError, match="more came"):
        while True:
            calls.from_server("server", DATA, (bytes(100_000),), first_bytes)
            sent += 100_000
    assert sent <= (1 << 20) * 17 / 16 + SLACK_BYTES
    assert [message["op"] for message in ends.caller[-1:]] == ["error"]
    assert ends.server[-1]["op"] == "cancel"
    assert not calls.from_server("server", DATA, ())


@pytest.mark.parametrize("op", ["data", "done"])
def test_an_answer_in_too_many_parts_is_not_passed_on(op: str) -> None:
    calls, ends = begun(4 << 20)
    with pytest.raises(ProtocolError, match="more came"):
        calls.from_server("server", {**DATA, "op": op}, [b""] * (MAX_ATTACHMENTS + 1))
    assert [message["op"] for message in ends.caller] == ["error"]
    assert not calls.from_server("server", DATA, ())


def test_what_a_call_may_have_fits_through_the_local_socket() -> None:
    assert max(MAX_ATTACHMENTS, 2 * MESSAGE_FRAMES) < MAX_PARTS


def test_a_server_that_keeps_to_its_credit_may_send_for_ever() -> None:
    calls, ends = begun(4 << 20)
    for _ in range(1000):
        assert calls.from_server("server", DATA, (bytes(1 << 20),), 20_000)
        calls.from_caller("caller", {"op": "credit", "id": 3, "bytes": 1 << 20})
    assert calls.from_server("server", {"op": "done", "id": 7, "result": {}}, ())
    assert ends.caller[-1]["op"] == "done"


@pytest.mark.parametrize("credit", [None, "x", -5, 1.5, True, 1 << 62])
def test_credit_may_be_anything(credit: object) -> None:
    calls, _ = begun(credit)
    calls.from_caller("caller", {"op": "credit", "id": 3, "bytes": credit})
    assert calls.from_server("server", DATA, (b"x",))


def test_a_refusal_is_told_of_who_said_it_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    refusals = Refusals()
    refusals.note(3, "it is none")
    refusals.note(4, "it speaks for another", after_s=8.0)
    assert refusals.alerts() == ["what node 3 says of trees of files is refused: it is none"]
    for _ in range(10):
        now += 1.0
        refusals.note(4, "it speaks for another", after_s=8.0)
    assert len(refusals.alerts()) == 2
    now += refusals_module.SHOWN_S + 1
    assert refusals.alerts() == []
