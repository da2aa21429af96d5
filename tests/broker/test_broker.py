"""Brokers alone, driven over their local sockets: frames reach the other node, whole, whatever is restarted."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker import node
from broker.cluster.state_directory import StateDirectory
from pmgsync.config import load_config
from pmgsync.core.frames import Frame, Header, make_frame, read_frames
from pmgsync.core.membership import Member, SignedDocument, first_document, sign, with_member, without_member
from pmgsync.core.positions import LAST, ZERO, Position
from pmgsync.errors import PmgsyncError, ResyncRequiredError, UnreachableError
from pmgsync.wire.link import BrokerLink
from tests.harness.cluster import eventually, free_ports

INCARNATION = 77
CLUSTER = b"0123456789abcdef"


class Broker:
    """A broker process with its state directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.state_dir = directory / name
        self.run_dir = Path(tempfile.mkdtemp(prefix="pmgsync-run-"))
        *self.ports, self.key_port = free_ports(4)
        self.config = directory / f"{name}.toml"
        self.config.write_text(
            f'[node]\nname = "{name}"\naddress = "127.0.0.1"\nstate_dir = "{self.state_dir}"\n'
            f'run_dir = "{self.run_dir}"\n[ports]\nevents = {self.ports[0]}\ncontrol = {self.ports[1]}\n'
            f"join = {self.ports[2]}\nkey = {self.key_port}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.links: list[BrokerLink] = []

    def member(self) -> Member:
        keys = StateDirectory(self.state_dir).keys()
        events, control, join = self.ports
        return Member(1, self.name, "127.0.0.1", events, control, join, keys.curve_public, keys.sign_public)

    def start(self) -> None:
        with (self.config.with_suffix(".log")).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "broker.main", "--config", str(self.config)], stdout=log, stderr=log
            )

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(10)

    def link(self, worker: str) -> BrokerLink:
        link = BrokerLink(self.run_dir / "broker.sock", worker)
        self.links.append(link)
        link.hello()
        return link

    def close(self) -> None:
        for link in self.links:
            link.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for path in self.run_dir.iterdir():
            path.unlink()
        self.run_dir.rmdir()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Broker, Broker]]:
    one, two = Broker(tmp_path, "one"), Broker(tmp_path, "two")
    try:
        document = with_member(first_document(CLUSTER, "test", "mirror", one.member()), two.member())
        signed = sign(document, 1, StateDirectory(one.state_dir).keys().sign_private)
        for broker in (one, two):
            StateDirectory(broker.state_dir).store_document(signed)
            broker.start()
        yield one, two
    finally:
        one.close()
        two.close()


def frame(prev: Position, here: Position, *, attempt: int = 1, size: int = 10) -> Frame:
    header = Header(CLUSTER, 1, 1, INCARNATION, prev, here, 1, attempt, 1)
    return make_frame(header, [struct.pack(">cQQI", b"B", here.lsn, 0, 1), os.urandom(size)])


def run_of(count: int, *, start: int = 100, size: int = 10) -> list[Frame]:
    return [frame(Position(start + n), Position(start + n + 1), size=size) for n in range(count)]


class Capture:
    """Plays the capture worker."""

    def __init__(self, broker: Broker) -> None:
        self.link = broker.link("capture")
        opened, _ = self.link.request({"op": "chain.open", "incarnation": INCARNATION, "start": 100, "snapshot": False})
        self.position = Position.parse(opened["position"])
        self.durable = Position(0)

    def send(self, frames: list[Frame]) -> None:
        for one in frames:
            self.link.send({"op": "frame"}, one.header_bytes, one.body)

    def wait_durable(self, position: Position) -> None:
        def reached() -> bool:
            while (received := self.link.receive(0.1)) is not None:
                if received[0]["op"] == "durable":
                    self.durable = Position.parse(received[0]["position"])
                assert received[0]["op"] != "error", received
            return self.durable >= position

        eventually(reached, what=f"durable at {position}")


class Apply:
    """Plays an apply worker."""

    def __init__(
        self, broker: Broker, *, incarnation: int = 0, position: Position = ZERO, credit: int = 1 << 24
    ) -> None:
        self.link = broker.link("apply:1")
        self.frames: list[Frame] = []

        def opened() -> object:
            try:
                return self.link.request(
                    {
                        "op": "apply.open",
                        "origin": 1,
                        "incarnation": incarnation,
                        "position": list(position),
                        "credit": credit,
                    }
                )[0]
            except ResyncRequiredError:
                raise
            except PmgsyncError:
                time.sleep(0.1)
                return None

        answer = eventually(opened, what="apply.opened")
        self.id = answer["id"]
        self.position = Position.parse(answer["position"])

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Say something now and then, as a worker does, while the test is busy elsewhere."""
        over = threading.Event()

        def talk() -> None:
            while not over.wait(0.3):
                self.link.send({"op": "report", "state": "A", "error": ""})

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def take(self, until: Position) -> list[Frame]:
        def reached() -> bool:
            while (received := self.link.receive(0.1)) is not None:
                message, parts = received
                assert message["op"] != "error", message
                if message["op"] == "frame":
                    self.frames.extend(read_frames(parts))
            self.link.send({"op": "report", "state": "A", "error": ""})
            return bool(self.frames) and self.frames[-1].here >= until

        eventually(reached, what=f"frames until {until}")
        return self.frames


def test_frames_arrive_live_and_after_every_kind_of_restart(pair: tuple[Broker, Broker]) -> None:
    one, two = pair
    frames = run_of(400, size=2000)
    capture = Capture(one)
    assert capture.position == Position(100)
    apply = Apply(two)
    assert apply.position == Position(100)
    capture.send(frames[:100])
    assert apply.take(frames[99].here) == frames[:100]
    capture.wait_durable(frames[99].here)

    two.kill()
    capture.send(frames[100:200])
    capture.wait_durable(frames[199].here)
    two.start()
    again = Apply(two, incarnation=INCARNATION, position=frames[49].here)
    assert again.take(frames[199].here) == frames[50:200]

    with again.kept():
        one.kill()
        one.start()
        capture = Capture(one)
    assert capture.position == frames[199].here
    capture.send(frames[200:])
    assert again.take(frames[-1].here) == frames[50:]


def test_a_large_transaction_is_begun_again_after_a_crash(pair: tuple[Broker, Broker]) -> None:
    one, two = pair
    capture, apply = Capture(one), Apply(two)
    parts = [
        frame(Position(100), Position(200, 1), attempt=5),
        frame(Position(200, 1), Position(200, 2), attempt=5),
    ]
    capture.send(parts)
    assert apply.take(Position(200, 2)) == parts
    capture.wait_durable(Position(200, 2))
    with apply.kept():
        one.kill()
        one.start()
        capture = Capture(one)
    assert capture.position == Position(100), "what is half journaled is dropped"
    again = [
        frame(Position(100), Position(200, 1), attempt=6),
        frame(Position(200, 1), Position(200, LAST), attempt=6),
        frame(Position(200), Position(300), attempt=6),
    ]
    capture.send(again)
    assert apply.take(Position(300)) == parts + again


def test_a_stranger_and_a_removed_member_get_nothing(pair: tuple[Broker, Broker], tmp_path: Path) -> None:
    one, two = pair
    capture, apply = Capture(one), Apply(two)
    frames = run_of(20)
    capture.send(frames[:10])
    apply.take(frames[9].here)
    one.link("cli").request({"op": "member.delete", "cid": 2})
    eventually(lambda: _left(two), what="the removed member knows it")
    capture.send(frames[10:])
    capture.wait_durable(frames[-1].here)
    before = len(apply.frames)
    assert apply.link.receive(1.0) is None or len(apply.frames) == before


def _left(broker: Broker) -> bool:
    signed = StateDirectory(broker.state_dir).document()
    return signed is not None and signed.document.member(2) is None


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
        cli.socket.send_multipart(garbage)
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
