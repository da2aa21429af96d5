"""A member that answers for trees of files as badly as a test tells it to, and a real node that follows them: a broker
process and a files worker process, no database."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from os import getpid
from pathlib import Path
from typing import Any

import msgpack
import psutil
import zmq

from broker.cluster.state_directory import StateDirectory
from pmgsync.core.announcements import Announcement
from pmgsync.core.manifests import Change, Entry, Manifest, pack_changes
from pmgsync.core.membership import first_document, sign, with_member
from pmgsync.wire.messages import Message, pack, unpack
from tests.harness.brokers import CLUSTER, FaultyBroker
from tests.harness.cluster import eventually
from tests.harness.fake_member import FakeMember

SPOOL = "/spool/cluster/1"
CONFIG = "/etc/x"
PROFILE = """
name = "hostile"
all_tables = true
[[files]]
kind = "config"
root = "/etc/x"
setting = "config_root"
include = ["main.cf", "conf.d/"]
max_files = 2000
[[files]]
kind = "spool"
root = "/spool"
setting = "spool_root"
tree = "cluster/{cid}"
max_files = 2000
"""

Answer = Callable[["FakeOwner", bytes, Message], bool]
"""Answers a call; False: it is to be answered as an honest owner does."""


def entry_of(content: bytes, **other: Any) -> Entry:
    """Return the entry of a file that tells the truth, but for `other`."""
    digest = blake2b(content, digest_size=32).digest()
    return Entry("f", 0o644, "root", "root", len(content), 1_700_000_000_000_000_000, digest)._replace(**other)


class FakeOwner(FakeMember):
    """Owns trees.

    Attributes:
        trees: what it says they hold, by name.
        contents: what it sends, by digest.
        answer: asked first for every call.
        calls: the methods that were called.
    """

    def __init__(self, directory: Path, name: str, cid: int) -> None:
        super().__init__(directory, name, cid)
        self.trees: dict[str, Manifest] = {}
        self.contents: dict[bytes, bytes] = {}
        self.answer: Answer = lambda owner, peer, message: False
        self.calls: list[str] = []
        self.credit: dict[int, int] = {}

    def hold(self, tree: str, name: bytes, content: bytes, **other: Any) -> None:
        """Have a file in a tree, and announce it."""
        entry = entry_of(content, **other)
        self.contents[entry.digest] = content
        self.change(tree, [(name, entry)])

    def change(self, tree: str, changes: Sequence[Change]) -> None:
        """Change a tree, and announce that."""
        manifest = self.trees.setdefault(tree, Manifest())
        base = manifest.digest
        for name, entry in changes:
            manifest.set(name, entry)
        self.event(b"t", Announcement(tree, manifest.digest, base, tuple(changes)).pack())

    def announce(self, tree: str, rows: object, *, digest: bytes = b"x" * 16, base: bytes = b"") -> None:
        """Announce rows as they are, though they may be none."""
        manifest = self.trees.setdefault(tree, Manifest())
        packed = msgpack.packb(rows, use_bin_type=True)
        news = {"tree": tree, "digest": digest, "base": base or manifest.digest, "changes": packed, "lsn": 0}
        self.event(b"t", msgpack.packb(news, use_bin_type=True))

    def say(self, peer: bytes, op: str, request: int, *attachments: bytes, **other: Any) -> None:
        """Send a part of an answer; only in the thread."""
        self._router.send_multipart([peer, pack({"op": op, "id": request, **other}), *attachments], zmq.NOBLOCK)

    def piece(self, peer: bytes, request: int, data: bytes, **piece: Any) -> None:
        """Send a piece of a result; only in the thread."""
        self.say(peer, "data", request, data, bytes=len(data), piece=piece)

    def _receive(self, parts: list[zmq.Frame]) -> None:
        peer, message = parts[0].bytes, unpack(parts[1].bytes)
        match message["op"]:
            case "call":
                self.calls.append(message["method"])
                self.credit[message["id"]] = message["credit"]
                if not self.answer(self, peer, message):
                    self._honest(peer, message)
            case "credit" if message["id"] in self.credit:
                self.credit[message["id"]] += message["bytes"]
            case "cancel":
                self.credit.pop(message["id"], None)
            case _:
                super()._receive(parts)

    def _honest(self, peer: bytes, message: Message) -> None:
        request, args = message["id"], message["args"]
        manifest = self.trees.get(args["tree"], Manifest())
        match message["method"]:
            case "files.sums":
                self.piece(peer, request, manifest.sums(), kind="sums")
                self.say(peer, "done", request, result={"digest": manifest.digest})
            case "files.entries":
                found = manifest.in_buckets(args["buckets"])
                self.piece(peer, request, pack_changes(found), kind="entries")
                self.say(peer, "done", request, result={"entries": len(found)})
            case _:
                for number, (_, digest, offset) in enumerate(args["items"]):
                    data = self.contents.get(digest, b"")[offset:]
                    for start in range(0, max(len(data), 1), 1 << 20):
                        piece = data[start : start + (1 << 20)]
                        last = start + len(piece) >= len(data)
                        told = [[number, offset + start, len(piece), last]]
                        self.piece(peer, request, piece, kind="contents", parts=told)
                self.say(peer, "done", request, result={"files": len(args["items"])})


class Follower:
    """The real node: CID 2.

    Attributes:
        root: has the trees, and beside them what nobody may touch.
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory / "follower"
        self.spool, self.etc = self.root / "spool", self.root / "etc"
        self.outside = self.root / "outside"
        self.outside.mkdir(parents=True)
        (self.outside / "precious").write_text("precious")
        profile = directory / "hostile.toml"
        profile.write_text(PROFILE)
        extra = f'[files]\nspool_root = "{self.spool}"\nconfig_root = "{self.etc}"\n'
        self.broker = FaultyBroker(directory, "node2", extra=extra)
        text = self.broker.config.read_text().replace("[ports]", f'profile = "{profile}"\n[ports]', 1)
        self.broker.config.write_text(text)
        self.log = directory / "files.log"
        self.worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start broker and worker."""
        self.broker.start()
        with self.log.open("ab") as log:
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "pmgsync.agent.process", "files", "--config", str(self.broker.config),
                 "--parent", str(getpid())],
                stdout=log, stderr=log,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Return worker and broker; both live."""
        assert self.worker is not None
        assert self.worker.poll() is None, self.log.read_text()
        assert self.broker.process is not None
        assert self.broker.alive, self.broker.log()
        return [psutil.Process(self.worker.pid), psutil.Process(self.broker.process.pid)]

    def rss_mib(self) -> float:
        """Resident memory of the larger one."""
        return max(process.memory_info().rss for process in self.processes()) / (1 << 20)

    def cpu_s(self) -> float:
        """CPU seconds of both so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def told(self) -> str:
        """Everything that status says of this node's trees, and of what was refused."""
        nodes = self.broker.status()
        texts = [alert["text"] for alert in nodes[2]["alerts"]] + [tree["error"] for tree in nodes[2]["trees"]]
        return "\n".join([*texts, *(str(node["error"]) for node in nodes.values())])

    def tells(self, *words: str, within_s: float = 30.0) -> str:
        """Wait until status says all of this."""
        return str(
            eventually(
                lambda: (told := self.told()) and all(word in told for word in words) and told,
                within_s=within_s,
                what=f"status says {words}, not {self.told()}",
            )
        )

    def files(self) -> set[str]:
        """Return every name below the root but for pmgsync's own."""
        names = {str(path.relative_to(self.root)) for path in self.root.rglob("*") if not path.is_dir()}
        return {name for name in names if ".pmgsync" not in name}

    def close(self) -> None:
        """End both."""
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()
        self.broker.close()


@contextmanager
def hostile(directory: Path) -> Iterator[tuple[FakeOwner, FakeOwner, Follower]]:
    """Run a cluster of a fake master (CID 1), a real node (2) and one more fake (3)."""
    master, third = FakeOwner(directory, "node1", 1), FakeOwner(directory, "node3", 3)
    follower = Follower(directory)
    document = first_document(CLUSTER, "test", str(directory / "hostile.toml"), master.member())
    document = with_member(with_member(document, follower.broker.member()), third.member())
    StateDirectory(follower.broker.state_dir).store_document(sign(document, 1, master.keys.sign_private))
    try:
        for fake in (master, third):
            fake.start([member for member in document.members if member.cid != fake.cid])
        follower.start()
        yield master, third, follower
    except BaseException:
        print(follower.log.read_text()[-5000:] if follower.log.exists() else "", follower.broker.log()[-3000:])
        raise
    finally:
        follower.close()
        for fake in (master, third):
            fake.close()
