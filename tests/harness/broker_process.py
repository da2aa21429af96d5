"""A broker as a process of its own, with a capture and an apply worker that the test plays."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from broker.cluster.state_directory import StateDirectory
from pmgsync.core.frames import Frame, Header, make_frame
from pmgsync.core.membership import Member
from pmgsync.core.positions import Position
from pmgsync.wire.link import BrokerLink
from tests.harness.cluster import eventually, free_ports

INCARNATION = 77


CLUSTER = b"0123456789abcdef"


STARTED_S = 60.0
"""A broker that has just been started is given so long, on a machine that does much else."""


class Broker:
    """A broker process with its state directory.

    Attributes:
        program: what Python runs.
    """

    program: Sequence[str] = ("-m", "broker.main")

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
                [sys.executable, *self.program, "--config", str(self.config)], stdout=log, stderr=log
            )

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(10)

    def link(self, worker: str) -> BrokerLink:
        link = BrokerLink(self.run_dir / "broker.sock", worker)
        self.links.append(link)
        link.hello(STARTED_S)
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
        self.position, self.watermark = Position.parse(opened["position"]), int(opened["watermark"])
        self.durable, self.marked = Position(0), 0

    def send(self, frames: list[Frame]) -> None:
        for one in frames:
            self.link.send({"op": "frame"}, one.header_bytes, one.body)

    def wait_durable(self, position: Position, watermark: int = 0) -> None:
        def reached() -> bool:
            self.hear()
            return self.durable >= position and self.marked >= watermark

        eventually(reached, what=f"durable at {position}, {watermark}")

    def hear(self) -> None:
        """Take what the broker has said."""
        while (received := self.link.receive(0.1)) is not None:
            if received[0]["op"] == "durable":
                self.durable, self.marked = Position.parse(received[0]["position"]), int(received[0]["watermark"])
            assert received[0]["op"] != "error", received
