"""One broker and its cluster document: sessions, changes, ports that are taken."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker import node
from broker.cluster.state_directory import StateDirectory
from pmgsync.config import load_config
from pmgsync.core.membership import ClusterDocument, SignedDocument, first_document, sign, with_member, without_member
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.wire.link import BrokerLink
from tests.harness.broker_process import CLUSTER, Broker, Capture, run_of
from tests.harness.cluster import eventually


def test_a_session_waits_for_its_broker_and_is_over_with_it(tmp_path: Path) -> None:
    one = Broker(tmp_path, "one")
    try:
        begun = time.monotonic()
        with (
            BrokerLink(one.run_dir / "broker.sock", "cli") as early,
            pytest.raises(UnreachableError, match="no broker answers"),
        ):
            early.hello(0.5)
        assert 0.4 < time.monotonic() - begun < 3
        starting = threading.Timer(0.5, one.start)
        starting.start()
        link = one.link("cli")
        starting.join()
        link.send({"op": "report"})
        one.kill()

        def refused() -> bool:
            try:
                link.send({"op": "report"})
            except UnreachableError:
                return True
            return False

        eventually(refused, within_s=2, what="the end of the connection is noticed")
        one.start()
        assert one.link("cli").request({"op": "ping"})[0]["op"] == "pong"
        assert refused(), "libzmq has connected again, to a broker that does not know this session"
    finally:
        one.close()


def test_the_conflicts_that_workers_report_are_shown_by_every_member(pair: tuple[Broker, Broker]) -> None:
    one, two = pair
    reports = {"apply:1": {"public.a.x": 2, "public.b.y": 1}, "apply:3": {"public.a.x": 5}}
    links = {worker: two.link(worker) for worker in reports}
    asked = [one.link("cli"), two.link("cli")]

    def shown() -> list[dict[str, int]]:
        for worker, link in links.items():
            link.send({"op": "report", "state": "A", "error": "", "counters": reports[worker]})
        return [cli.request({"op": "status"})[0]["status"]["nodes"][1]["conflicts"] for cli in asked]

    eventually(lambda: shown() == [{"public.a.x": 7, "public.b.y": 1}] * 2, within_s=10)
    links.pop("apply:1").close()
    eventually(lambda: shown() == [{"public.a.x": 5}] * 2, within_s=10, what="what a worker counted goes with it")


def test_a_document_that_cannot_be_written_ends_nobody_and_is_taken_later(pair: tuple[Broker, Broker]) -> None:
    one, two = pair
    cli = two.link("cli")

    def status() -> dict[str, Any]:
        answer: dict[str, Any] = cli.request({"op": "status"})[0]["status"]
        return answer

    eventually(lambda: status()["nodes"][0]["heartbeat_age_s"] is not None, what="the master is heard")
    # What stands in the way of the new file; a full disk would.
    (two.state_dir / "cluster.document.new").mkdir()
    state = StateDirectory(one.state_dir)
    held = state.document()
    assert held is not None
    third = replace(held.document.members[1], name="three", address="127.0.0.9", curve_key=b"3" * 32)
    one.kill()
    state.store_document(sign(with_member(held.document, third), 1, state.keys().sign_private))
    one.start()
    eventually(
        lambda: any("cannot be written" in alert["text"] for alert in status()["nodes"][1]["alerts"]),
        what="it says that it cannot take the document",
    )
    assert len(status()["nodes"]) == 2
    (two.state_dir / "cluster.document.new").rmdir()
    eventually(lambda: len(status()["nodes"]) == 3, within_s=10, what="the document is taken")


def test_a_port_that_is_not_free_yet_does_not_hold_the_loop_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Broker(tmp_path, "one"), Broker(tmp_path, "two")
    state = StateDirectory(one.state_dir)
    keys = state.keys()
    both = with_member(first_document(CLUSTER, "test", "mirror", one.member()), two.member())
    state.store_document(sign(both, 1, keys.sign_private))
    served = node.Broker(load_config(one.config))
    port = served._resources.ports.control
    close = port.close
    taken: list[socket.socket] = []

    def close_and_take(*, linger_ms: int = 0) -> None:
        """Have somebody else on the control port at the moment when it was closed."""
        close(linger_ms=linger_ms)
        monkeypatch.undo()
        taken.append(eventually(lambda: _listener(one.ports[1]), within_s=10, what="the port is closed"))

    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        cli = one.link("cli")
        monkeypatch.setattr(port, "close", close_and_take)
        cli.request({"op": "member.delete", "cid": 2})
        assert taken, "a member's removal closes the members' sockets"
        begun = time.monotonic()
        for _ in range(5):
            cli.request({"op": "status"})
        assert time.monotonic() - begun < 1.0
        taken.pop().close()
        eventually(lambda: _answers_as_zmq(one.ports[1]), within_s=10, what="the port is bound again")
        assert [found["cid"] for found in cli.request({"op": "status"})[0]["status"]["nodes"]] == [1]
    finally:
        served.stop()
        thread.join(10)
        for held in taken:
            held.close()
        one.close()
        two.close()


def test_a_port_that_stays_taken_puts_the_broker_out_of_the_cluster_until_it_is_free(tmp_path: Path) -> None:
    one = Broker(tmp_path, "one")
    taken = eventually(lambda: _listener(one.ports[1]), what="the port is taken")
    try:
        one.start()
        cli = one.link("cli")
        state = StateDirectory(one.state_dir)
        signed = sign(first_document(CLUSTER, "test", "mirror", one.member()), 1, state.keys().sign_private)
        with pytest.raises(PmgsyncError, match=f"control port {one.ports[1]} .* cannot be bound"):
            cli.request({"op": "cluster.enter"}, signed.pack())
        with pytest.raises(PmgsyncError, match="no cluster defined"):
            cli.request({"op": "status"})
        taken.close()
        eventually(lambda: _answers_as_zmq(one.ports[1]), within_s=10, what="the port is bound")
        assert cli.request({"op": "status"})[0]["status"]["nodes"]
    finally:
        taken.close()
        one.close()


def _listener(port: int) -> socket.socket | None:
    """Return a socket that holds a port, None while somebody else does."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None


def _answers_as_zmq(port: int) -> bool:
    """Return True when a ZMTP greeting comes from a port."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            return connection.recv(1) == b"\xff"
    except OSError:
        return False


def test_garbage_on_the_local_socket_is_answered_and_hurts_nobody(pair: tuple[Broker, Broker]) -> None:
    one, _ = pair
    capture = Capture(one)
    cli = one.link("cli")
    for garbage in ([b""], [b"\xc1"], [b"\x01"], [b"\x80"], [b"\x81\xa2op\x01"], [os.urandom(50), os.urandom(9)]):
        cli.put(garbage)
        received = cli.receive(5)
        assert received is not None
        assert received[0]["op"] == "error"
    with pytest.raises(PmgsyncError, match="not known"):
        cli.request({"op": "nonsense"})
    frames = run_of(3)
    capture.send(frames)
    capture.wait_durable(frames[-1].here)


def test_a_document_that_nobody_signed_is_refused(pair: tuple[Broker, Broker]) -> None:
    one, two = pair
    state = StateDirectory(one.state_dir)
    held = state.document()
    assert held is not None
    forged = sign(without_member(held.document, 2), 1, StateDirectory(two.state_dir).keys().sign_private)
    with pytest.raises(PmgsyncError, match="signature"):
        SignedDocument.unpack(forged.pack()).verify(held.document)


def test_a_silent_joining_node_goes_even_if_the_document_cannot_be_written_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.cluster.joiners.SILENCE_S", 0.5)
    one, two = Broker(tmp_path, "one"), Broker(tmp_path, "two")
    state = StateDirectory(one.state_dir)
    newcomer = replace(two.member(), state="joining")
    both = with_member(first_document(CLUSTER, "test", "mirror", one.member()), newcomer)
    state.store_document(sign(both, 1, state.keys().sign_private))
    # What stands in the way of the new file; a full disk would.
    (one.state_dir / "cluster.document.new").mkdir()
    tries: list[int] = []
    served = node.Broker(load_config(one.config))
    change = served._documents.change

    def counted(document: ClusterDocument) -> SignedDocument:
        tries.append(1)
        return change(document)

    monkeypatch.setattr(served._documents, "change", counted)
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        cli = one.link("cli")
        eventually(lambda: len(tries) > 1, within_s=10, what="it is tried, and tried again")
        assert len(cli.request({"op": "status"})[0]["status"]["nodes"]) == 2
        (one.state_dir / "cluster.document.new").rmdir()
        eventually(lambda: len(cli.request({"op": "status"})[0]["status"]["nodes"]) == 1, within_s=10)
    finally:
        served.stop()
        thread.join(10)
        one.close()
        two.close()
