"""A member of the cluster that a test plays: it publishes what it is told to, and answers `replay` as badly as it is
told to. Keys, CURVE and ZAP are real."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from broker.cluster.state_directory import StateDirectory
from broker.heartbeats.heartbeat import Heartbeat, HeldChain, OwnChain
from broker.net import sockets
from broker.net.loop import Loop, Socket
from broker.net.refusals import Refusals
from broker.net.zap import ZapHandler
from pmgsync.core.frames import Frame
from pmgsync.core.membership import Member
from pmgsync.core.positions import Position
from pmgsync.errors import UnreachableError
from pmgsync.wire.messages import Message, error_map, pack, unpack
from tests.harness.brokers import CLUSTER, INCARNATION, START
from tests.harness.cluster import free_ports

BEAT_S = 0.2
OVERSHOOT = 200
"""Frames that a replay which ignores its credit sends at once."""


@dataclass
class Replay:
    """A stream that the fake serves."""

    peer: bytes
    request: int
    position: Position
    credit: int
    messages: int = 0


@dataclass
class Habits:
    """How the fake behaves. Replays: `serve` decides, for each request, what is done with it.

    Attributes:
        serve: "well", "error", "resync", "silent", "end" (at once, without a frame), "elsewhere" (frames that do not
            follow), "greedy" (ignores credit), or "damaged" (one byte of the first frame is wrong).
        heartbeats: False for a member that is not heard.
        refused: how many ZAP requests are answered with "not a member" before it lets anybody in, by purpose.
    """

    serve: Callable[[Message], str] = lambda _: "well"
    heartbeats: bool = True
    refused: int = 0


class FakeMember:
    """Binds the events and control sockets of a member and lives in a thread of its own.

    Attributes:
        frames: its journal of the chain: what `replay` is served from.
        requests: every replay that was asked for.
        acks: the newest applied positions that peers told it of.
    """

    def __init__(self, directory: Path, name: str, cid: int, *, origin: int = 1) -> None:
        self.name, self.cid, self.origin = name, cid, origin
        self.keys = StateDirectory(directory / name).keys()
        self.ports = free_ports(3)
        self.habits = Habits()
        self.frames: list[Frame] = []
        self.first = Position(START)
        self.head_told: Position | None = None
        self.requests: list[Message] = []
        self.acks: dict[int, list[int]] = {}
        self.context: zmq.Context[Socket] = zmq.Context()
        self._members: dict[bytes, int] = {}
        self._replays: list[Replay] = []
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"fake-{name}", daemon=True)

    def member(self) -> Member:
        """How the cluster document has it."""
        events, control, join = self.ports
        keys = self.keys
        return Member(self.cid, self.name, "127.0.0.1", events, control, join, keys.curve_public, keys.sign_public)

    def start(self, peers: Sequence[Member]) -> None:
        """Bind; `peers` may connect."""
        self._members = {member.curve_key: member.cid for member in peers}
        self._thread.start()
        assert self._bound.wait(10)

    def close(self) -> None:
        """Unbind."""
        if self._thread.is_alive():
            self.do(self._loop.stop)
            self._thread.join(10)

    def do(self, act: Callable[[], object]) -> None:
        """Have something done in the thread, and wait for it."""
        done = threading.Event()

        def acting() -> None:
            try:
                act()
            finally:
                done.set()

        self._work.put(acting)
        assert done.wait(20)

    # -- what the test says -------------------------------------------------------------------------------------------

    def keep(self, frame: Frame) -> None:
        """Put a frame into the journal; what it replaces (a transaction begun again) goes."""
        self.frames = [held for held in self.frames if held.here <= frame.prev] + [frame]

    def publish(self, header: bytes, body: bytes) -> None:
        """Publish a frame, whatever it is."""
        self.event(b"f", header, body)

    def event(self, *parts: bytes) -> None:
        """Publish anything."""
        self.do(lambda: self._publisher.send_multipart(parts))

    def heartbeat(self, **other: Any) -> Heartbeat:
        """Return a heartbeat that tells the truth, but for `other`."""
        head = self.head_told or (self.frames[-1].here if self.frames else self.first)
        own = OwnChain(INCARNATION, START, False, head.lsn) if self.cid == self.origin else None
        values: dict[str, Any] = {
            "cluster": CLUSTER, "cid": self.cid, "epoch": 1, "serial": 1, "master": 1, "uptime_s": 1,
            "time_us": time.time_ns() // 1000, "load1": 0.0, "mem_pct": 1.0, "disk_pct": 1.0,
            "state": "A", "error": "", "alerts": (),
            "chains": {self.origin: HeldChain(INCARNATION, self.first, head)}, "own": own, "applied": {},
        }  # fmt: skip
        return Heartbeat(**(values | other))

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        loop = self._loop = Loop()
        zap = ZapHandler(self.context, loop, self._cid_of, Refusals(time.monotonic))
        self._publisher = sockets.open_socket(self.context, zmq.PUB)
        sockets.serve(self._publisher, self.keys.curve_secret, "127.0.0.1", self.ports[0], "events")
        self._router = sockets.open_socket(self.context, zmq.ROUTER, hwm=10_000)
        sockets.serve(self._router, self.keys.curve_secret, "127.0.0.1", self.ports[1], "control")
        loop.add_socket(self._router, self._receive)
        loop.every(0.005, self._do_work)
        loop.every(BEAT_S, self._beat)
        self._bound.set()
        try:
            loop.run()
        finally:
            zap.close()
            self.context.destroy(linger=0)

    def _cid_of(self, key: bytes) -> int:
        if self.habits.refused > 0:
            self.habits.refused -= 1
            return 0
        return self._members.get(key, 0)

    def _do_work(self) -> None:
        while not self._work.empty():
            self._work.get()()

    def _beat(self) -> None:
        if self.habits.heartbeats:
            self._publisher.send_multipart([b"h", self.heartbeat().pack()])

    def _send(self, peer: bytes, message: Mapping[str, Any], *attachments: bytes) -> None:
        self._router.send_multipart([peer, pack(message), *attachments])

    def _receive(self, parts: list[zmq.Frame]) -> None:
        peer, message = parts[0].bytes, unpack(parts[1].bytes)
        match message["op"]:
            case "replay":
                self.requests.append(message)
                self._serve(peer, message)
            case "credit":
                for replay in self._replays:
                    if (replay.peer, replay.request) == (peer, message["id"]):
                        replay.credit += message["bytes"]
                        self._pump(replay)
                        break
            case "cancel":
                self._replays = [
                    replay for replay in self._replays if (replay.peer, replay.request) != (peer, message["id"])
                ]
            case "ping":
                self._send(peer, {"op": "pong", "id": message["id"]})
            case "ack":
                self.acks.update(message["applied"])
            case _:
                pass

    def _serve(self, peer: bytes, message: Message) -> None:
        request, position = message["id"], Position.parse(message["position"])
        habit = self.habits.serve(message)
        following = [frame for frame in self.frames if frame.here > position]
        match habit:
            case "error":
                self._send(peer, error_map(request, UnreachableError("not now")))
            case "resync":
                error = {"op": "error", "id": request, "error": "resync_required", "message": "gone", "hint": ""}
                self._send(peer, {**error, "recoverable": False})
            case "end":
                self._send(peer, {"op": "end", "id": request, "position": list(position)})
            case "elsewhere":
                for frame in following[1:]:
                    self._send(peer, {"op": "frame", "id": request}, frame.header_bytes, frame.body)
            case "greedy":
                for frame in (following * OVERSHOOT)[:OVERSHOOT]:
                    self._send(peer, {"op": "frame", "id": request}, frame.header_bytes, frame.body)
                self._send(peer, {"op": "end", "id": request, "position": list(position)})
            case "damaged":
                for n, frame in enumerate(following):
                    body = frame.body if n else frame.body[:-1] + bytes([frame.body[-1] ^ 1])
                    self._send(peer, {"op": "frame", "id": request}, frame.header_bytes, body)
                self._send(peer, {"op": "end", "id": request, "position": list(position)})
            case "well":
                replay = Replay(peer, request, position, message["credit"])
                self._replays.append(replay)
                self._pump(replay)
            case _:
                pass

    def _pump(self, replay: Replay) -> None:
        while replay.credit > 0:
            following = [frame for frame in self.frames if frame.here > replay.position]
            if not following:
                self._replays.remove(replay)
                self._send(replay.peer, {"op": "end", "id": replay.request, "position": list(replay.position)})
                return
            # A message may hold one frame or several.
            replay.messages += 1
            together = following[: 1 + replay.messages % 3]
            parts = [part for frame in together for part in (frame.header_bytes, frame.body)]
            self._send(replay.peer, {"op": "frame", "id": replay.request}, *parts)
            replay.credit -= sum(frame.size for frame in together)
            replay.position = together[-1].here
