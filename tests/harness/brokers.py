"""Brokers under fault: proxied ones, a capture that frames transactions at will, a receiver that checks every row."""

from __future__ import annotations

import random
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from broker.cluster.state_directory import StateDirectory
from pmgsync.core.chains import ChainHead, Verdict
from pmgsync.core.frames import Frame, Header, make_frame, read_frames, unpack_body
from pmgsync.core.membership import ClusterDocument, Member, SignedDocument, first_document, sign, with_member
from pmgsync.core.positions import LAST, Position
from pmgsync.errors import PmgsyncError, ResyncRequiredError
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message
from tests.harness.broker_process import Broker
from tests.harness.cluster import eventually
from tests.harness.proxy import Link

CLUSTER = b"0123456789abcdef"
INCARNATION = 77
START = 100
BEGINNING = Position(START)
LOG_LINES = 40
"""Of each broker's log, shown when a test fails."""
IN_FLIGHT = 16 << 20
"""Bytes that the real capture has on their way to the disk at most."""
MEMORY_MIB = 256


class FaultyBroker(Broker):
    """A broker that is reached through proxies, when it is asked for, and whose memory is watched."""

    def __init__(self, directory: Path, name: str, *, proxied: bool = False, extra: str = "") -> None:
        super().__init__(directory, name)
        with self.config.open("a") as file:
            file.write(extra)
        self.link_in = Link(self.ports) if proxied else None

    def member(self) -> Member:
        keys = StateDirectory(self.state_dir).keys()
        events, control, join = self.link_in.ports if self.link_in is not None else self.ports
        return Member(1, self.name, "127.0.0.1", events, control, join, keys.curve_public, keys.sign_public)

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self.process is not None and self.process.poll() is None

    def rss_mib(self) -> float:
        """Resident memory of the process in MiB."""
        assert self.process is not None
        return float(psutil.Process(self.process.pid).memory_info().rss) / (1 << 20)

    def signal(self, number: int) -> None:
        """Send the process a signal and do not wait."""
        assert self.process is not None
        self.process.send_signal(number)

    def log(self) -> str:
        """What the broker has logged so far."""
        return self.config.with_suffix(".log").read_text(errors="replace")

    def status(self) -> dict[int, dict[str, Any]]:
        """Return the nodes of the status map by CID."""
        return {node["cid"]: node for node in self.status_map()["nodes"]}

    def refused(self) -> set[tuple[str, str]]:
        """Return what the broker has refused lately: port and reason."""
        return {(one["port"], one["reason"]) for one in self.status_map()["refused"]}

    def status_map(self) -> dict[str, Any]:
        """Return the whole status map."""
        link = self.link("cli")
        try:
            answer, _ = link.request({"op": "status"}, timeout_s=20)
            found: dict[str, Any] = answer["status"]
            return found
        finally:
            self.links.remove(link)
            link.close()

    def close(self) -> None:
        if self.link_in is not None:
            self.link_in.close()
        super().close()


def document_of(brokers: Sequence[FaultyBroker], *others: Member) -> SignedDocument:
    """Return a document with these brokers and other members, in this order, the first one master and signer."""
    document: ClusterDocument | None = None
    for member in [*(broker.member() for broker in brokers), *others]:
        document = with_member(document, member) if document else first_document(CLUSTER, "test", "mirror", member)
    assert document is not None
    return sign(document, 1, StateDirectory(brokers[0].state_dir).keys().sign_private)


@contextmanager
def running_brokers(
    directory: Path, count: int, *, proxied: bool = False, extra: str = ""
) -> Iterator[list[FaultyBroker]]:
    """Run a cluster of brokers; node n is at index n - 1."""
    brokers = [FaultyBroker(directory, f"node{n}", proxied=proxied, extra=extra) for n in range(1, count + 1)]
    try:
        signed = document_of(brokers)
        for broker in brokers:
            StateDirectory(broker.state_dir).store_document(signed)
            broker.start()
        yield brokers
    except BaseException:
        for broker in brokers:
            log = broker.config.with_suffix(".log")
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            print(f"--- {broker.name}", *lines[-LOG_LINES:], sep="\n")
        raise
    finally:
        for broker in brokers:
            broker.close()


# -- what is replicated -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transaction:
    """A transaction: its commit LSN and its rows."""

    lsn: int
    rows: tuple[bytes, ...]


def make_transactions(rng: random.Random, count: int, *, start: int = START, large: float = 0.1) -> list[Transaction]:
    """Return transactions of random sizes; some have rows enough for several parts."""
    made, lsn = [], start
    for _ in range(count):
        lsn += rng.randint(1, 1000)
        rows = rng.randint(8, 30) if rng.random() < large else rng.randint(1, 4)
        made.append(Transaction(lsn, tuple(rng.randbytes(rng.randint(10, 400)) for _ in range(rows))))
    return made


def message_of(lsn: int, row: bytes) -> bytes:
    """Return the message that stands for a row of a transaction."""
    return struct.pack(">Q", lsn) + row


def make_frames(
    rng: random.Random, transactions: Sequence[Transaction], after: Position, *, attempt: int, origin: int = 1
) -> Iterator[Frame]:
    """Frame what follows a complete position as one run of capture would, with borders where chance puts them."""
    position = after

    def close(here: Position, rows: list[bytes]) -> Frame:
        nonlocal position
        header = Header(CLUSTER, 1, origin, INCARNATION, position, here, 1, attempt, len(rows))
        position = here
        return make_frame(header, rows)

    rows: list[bytes] = []
    last_lsn = after.lsn
    for transaction in transactions:
        if transaction.lsn <= after.lsn:
            continue
        messages = [message_of(transaction.lsn, row) for row in transaction.rows]
        if len(messages) > 6:
            if rows:
                yield close(Position(last_lsn), rows)
                rows = []
            part = 1
            while messages:
                size = rng.randint(1, 8)
                chunk, messages = messages[:size], messages[size:]
                yield close(Position(transaction.lsn, part if messages else LAST), chunk)
                part += 1
        else:
            rows += messages
            last_lsn = transaction.lsn
            if rng.random() < 0.6:
                yield close(Position(transaction.lsn), rows)
                rows = []
    if rows:
        yield close(Position(last_lsn), rows)


class Ledger:
    """What a receiver has: the transactions that are whole, and the rows of the one that is half in.

    It interprets frames by the rules of PROTOCOL.md, section 2, and holds the broker to its promise that what it hands
    to an apply worker fits, or begins a transaction again.
    """

    def __init__(self, start: Position = BEGINNING) -> None:
        self.head = ChainHead.at(1, INCARNATION, start)
        self.transactions: list[Transaction] = []
        self._half: list[bytes] = []
        self.begun_again = 0

    def take(self, frame: Frame) -> None:
        """Take the next frame."""
        verdict = self.head.judge(frame.header)
        if verdict is Verdict.DUPLICATE and not self.head.position.complete:
            # The broker dropped the parts of this transaction and fetched them again.
            return
        assert verdict in {Verdict.FITS, Verdict.BEGIN_AGAIN}, f"{verdict} at {self.head}: {frame.header}"
        if verdict is Verdict.BEGIN_AGAIN:
            self.forget_half()
            self.begun_again += 1
        rows: dict[int, list[bytes]] = {}
        for message in unpack_body(frame.body):
            rows.setdefault(struct.unpack(">Q", message[:8])[0], []).append(message[8:])
        if not frame.prev.complete or not frame.here.complete:
            self._half += rows[frame.here.lsn]
            if frame.here.complete:
                self.transactions.append(Transaction(frame.here.lsn, tuple(self._half)))
                self._half = []
        else:
            known = self.head.complete.lsn
            self.transactions += [Transaction(lsn, tuple(row)) for lsn, row in sorted(rows.items()) if lsn > known]
        self.head = self.head.advanced(frame.header)

    def forget_half(self) -> None:
        """Drop the half transaction, as a restarted worker does."""
        self._half = []
        self.head = self.head.without_parts()


@dataclass
class Receiver:
    """Plays an apply worker that survives its broker: it opens its stream again whenever it has to."""

    broker: Broker
    worker: str = "apply:1"
    credit: int = 8 << 20
    known: bool = False
    confirms: bool = True
    reopened: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    _link: BrokerLink | None = None
    _stream: int = 0
    _told: float = 0.0

    def step(self, wait_s: float = 0.05) -> None:
        """Take what there is.

        Raises:
            ResyncRequiredError: when the broker says so.
        """
        try:
            if self._link is None:
                self._open()
            assert self._link is not None
            while (received := self._link.receive(wait_s)) is not None:
                self._take(*received)
                wait_s = 0
            if time.monotonic() - self._told > 0.5:
                self._told = time.monotonic()
                self._link.send({"op": "report", "state": "A", "error": ""})
        except ResyncRequiredError:
            raise
        except PmgsyncError:
            self.reopen()
            time.sleep(0.02)

    def reopen(self) -> None:
        """Be a worker that was restarted."""
        if self._link is not None:
            self.broker.links.remove(self._link)
            self._link.close()
            self._link = None
            self.reopened += 1
        self.ledger.forget_half()

    def _open(self) -> None:
        link = BrokerLink(self.broker.run_dir / "broker.sock", self.worker)
        self.broker.links.append(link)
        self._link = link
        link.hello(1.0)
        position = self.ledger.head.complete
        incarnation = INCARNATION if self.known or self.ledger.transactions else 0
        request = {"op": "apply.open", "origin": 1, "incarnation": incarnation, "position": list(position)}
        answer, _ = link.request({**request, "credit": self.credit}, timeout_s=2.0)
        assert answer["incarnation"] == INCARNATION
        assert Position.parse(answer["position"]) == position
        self._stream = answer["id"]

    def _take(self, message: Message, parts: Sequence[bytes]) -> None:
        assert self._link is not None
        if message["op"] == "error":
            error = PmgsyncError(str(message))
            raise ResyncRequiredError(message["message"]) if message["error"] == "resync_required" else error
        if message["op"] != "frame" or message["id"] != self._stream:
            return
        size = 0
        for frame in read_frames(parts):
            self.ledger.take(frame)
            size += frame.size
        if self.credit:
            self._link.send({"op": "credit", "id": self._stream, "bytes": size})
        if self.confirms and self.ledger.head.position.complete:
            position = list(self.ledger.head.position)
            self._link.send({"op": "applied", "origin": 1, "incarnation": INCARNATION, "position": position})

    def give(self, size: int) -> None:
        """Give credit by hand."""
        assert self._link is not None
        self._link.send({"op": "credit", "id": self._stream, "bytes": size})


class Source:
    """Plays capture: sends transactions, survives its broker, and frames anew from wherever the journal ends.

    Attributes:
        durable: the newest complete position that it was told is on disk: what a slot would be confirmed to.
        told: where the journal ended each time that the chain was opened.
    """

    def __init__(self, broker: Broker, rng: random.Random, transactions: Sequence[Transaction]) -> None:
        self.broker = broker
        self.transactions = transactions
        self.durable = Position(START)
        self.told: list[Position] = []
        self._rng = rng
        self._attempt = 0
        self._link: BrokerLink | None = None
        self._frames: Iterator[Frame] = iter(())
        self._in_flight: list[tuple[Position, int]] = []
        self._pending = 0
        self._told_durable = Position(0)
        self._reported = 0.0
        self.done = False

    def step(self, frames: int = 1_000_000) -> None:
        """Send as many frames as may be on their way, at most `frames`."""
        try:
            if self._link is None:
                self._open()
            assert self._link is not None
            while (received := self._link.receive(0)) is not None:
                message = received[0]
                if message["op"] == "error":
                    raise PmgsyncError(str(message))
                if message["op"] == "durable":
                    self._note(Position.parse(message["position"]))
            while self._pending < IN_FLIGHT and frames > 0:
                frame = next(self._frames, None)
                if frame is None:
                    self.done = True
                    break
                self._link.send({"op": "frame"}, frame.header_bytes, frame.body)
                self._in_flight.append((frame.here, frame.size))
                self._pending += frame.size
                frames -= 1
            if time.monotonic() - self._reported > 0.5:
                self._reported = time.monotonic()
                self._link.send({"op": "report", "state": "A", "error": ""})
        except PmgsyncError:
            self.restart()

    def restart(self) -> None:
        """Be a capture that was restarted: the next step asks the journal where it ends."""
        if self._link is not None:
            self.broker.links.remove(self._link)
            self._link.close()
        self._link = None

    def _open(self) -> None:
        link = BrokerLink(self.broker.run_dir / "broker.sock", "capture")
        self.broker.links.append(link)
        self._link = link
        link.hello(1.0)
        request = {"op": "chain.open", "incarnation": INCARNATION, "start": START, "snapshot": False}
        opened, _ = link.request(request, timeout_s=2.0)
        position = Position.parse(opened["position"])
        self.told.append(position)
        # What was confirmed is gone from the WAL: a journal that ends before it has lost transactions.
        assert position >= self.durable, f"the journal ends at {position}, {self.durable} was durable"
        self._attempt += 1
        self._frames = make_frames(self._rng, self.transactions, position, attempt=self._attempt)
        self._in_flight, self._pending, self.done = [], 0, False
        self._told_durable = Position(0)

    def _note(self, position: Position) -> None:
        if position.complete:
            # A restarted broker counts as durable only what it has synced itself: it tells less at first.
            assert position >= self._told_durable, "what is durable never goes back"
            self._told_durable = position
            self.durable = max(self.durable, position)
        while self._in_flight and self._in_flight[0][0] <= position:
            self._pending -= self._in_flight.pop(0)[1]


def until(condition: Callable[[], object], *steps: Callable[[], object], within_s: float = 60.0, what: str = "") -> Any:
    """Keep everybody going until a condition holds."""

    def stepped() -> object:
        for step in steps:
            step()
        return condition()

    return eventually(stepped, within_s=within_s, what=what)


def run_directory() -> Path:
    """Return a new short directory for a unix socket."""
    return Path(tempfile.mkdtemp(prefix="pmgsync-run-"))
