"""A member that answers for trees of files and lies: nothing leaves the tree, memory, disk and CPU stay bounded, status
says who sent what, and when it tells the truth again, all goes on. Real sockets, a real broker, a real files worker."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from pmgsync.agent import tree_client
from pmgsync.core.filenames import show
from pmgsync.core.manifests import Change, Manifest, bucket_of, pack_changes
from pmgsync.errors import ProtocolError
from pmgsync.wire.messages import Message
from tests.harness.cluster import eventually
from tests.harness.fake_owner import CONFIG, SPOOL, FakeOwner, Follower, entry_of, hostile

pytestmark = pytest.mark.cluster
GROWN_MIB = 80
World = tuple[FakeOwner, FakeOwner, Follower]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with hostile(tmp_path) as world:
        master, _, follower = world
        master.hold(SPOOL, b"spam/first", b"first")
        eventually((follower.spool / "cluster/1/spam/first").exists, what="the first file")
        yield world


def arrives(follower: Follower, name: str, content: bytes, *, within_s: float = 60.0) -> None:
    """Wait for a file of the spool."""
    path = os.fsencode(follower.spool / "cluster/1") + b"/" + os.fsencode(name)

    def there() -> bool:
        return os.path.isfile(path) and Path(os.fsdecode(path)).read_bytes() == content

    eventually(there, within_s=within_s, what=f"{name!r} with its content; {follower.told()}")


def unharmed(follower: Follower, allowed: set[str]) -> None:
    """Check that there is nothing but what may be there."""
    assert follower.files() - allowed <= {"outside/precious", "spool/cluster/1/spam/first"}
    assert (follower.outside / "precious").read_text() == "precious"
    assert [path.name for path in follower.outside.iterdir()] == ["precious"]


def row(name: object, **other: Any) -> list[Any]:
    """Return an entry as it travels."""
    return [name, *entry_of(b"x")._replace(**other)]


BAD_ROWS = {
    "a name that leaves": row(b"../../outside/x"),
    "a name that leaves in the middle": row(b"spam/../../../outside/x"),
    "an absolute name": row(b"/etc/passwd"),
    "pmgsync's own": row(b".pmgsync/marker"),
    "a part of 256 bytes": row(b"x" * 256),
    "no bytes": row("text"),
    "NUL": row(b"a\0b"),
    "a symbolic link": row(b"link", kind="l"),
    "a hard link": row(b"link", kind="h"),
    "a device": row(b"device", kind="c"),
    "a user with NUL": row(b"user", user="a\0b"),
    "a user with a line end": row(b"user", user="a\nroot"),
    "a negative size": row(b"size", size=-1),
    "a size without end": row(b"size", size=1 << 60),
    "a flag for a mode": row(b"mode", mode=True),
    "a time without end": row(b"time", mtime_ns=1 << 63),
    "a deep nest": [[[[[[[[b"a"]]]]]]]],
}


def test_names_and_kinds_that_cannot_be_are_refused_and_told(world: World) -> None:
    master, _, follower = world
    before = follower.rss_mib()
    for bad in BAD_ROWS.values():
        master.announce(SPOOL, [bad])
    follower.tells("node 1")
    # The same in answer to a comparison: the tree says that it differs, and its entries are these.
    for bad in (BAD_ROWS["a name that leaves"], BAD_ROWS["a device"]):

        def answer(owner: FakeOwner, peer: bytes, message: Message, bad: list[Any] = bad) -> bool:
            if message["method"] != "files.entries" or message["args"]["tree"] != SPOOL:
                return False
            owner.piece(peer, message["id"], msgpack.packb([bad], use_bin_type=True), kind="entries")
            owner.say(peer, "done", message["id"], result={"entries": 1})
            return True

        master.answer = answer
        master.trees[SPOOL].set(b"other", entry_of(os.urandom(9)))
        master.announce(SPOOL, [], digest=master.trees[SPOOL].digest)
        follower.tells("node 1 sends what cannot be a tree's")
        unharmed(follower, set())
        master.answer = lambda *_: False
        master.trees[SPOOL].set(b"other", None)
        eventually(lambda: not [tree for tree in follower.broker.status()[2]["trees"] if tree["error"]])
    assert follower.rss_mib() - before < GROWN_MIB
    master.answer = lambda *_: False
    master.hold(SPOOL, b"spam/honest", b"honest")
    arrives(follower, "spam/honest", b"honest")
    unharmed(follower, {"spool/cluster/1/spam/honest"})
    eventually(lambda: not [tree for tree in follower.broker.status()[2]["trees"] if tree["error"]])


ODD = [
    b"\xff\xfe\x80",
    b"new\nline",
    "ü\u202e\u0301".encode(),
    b"-rf",
    b"x" * 255,
    b"sp ace",
    b"...",
    b"a\\b",
    b"~",
    b"\x01\x1b[31m",
]


def test_odd_names_arrive_as_they_are(world: World) -> None:
    master, _, follower = world
    for name in ODD:
        master.hold(SPOOL, b"odd/" + name, b"odd " + name)
    for name in ODD:
        arrives(follower, "odd/" + os.fsdecode(name), b"odd " + name)
    assert all(show(name).isprintable() for name in ODD)


def test_links_that_stand_in_the_tree_lead_nowhere(world: World) -> None:
    master, _, follower = world
    inner = follower.spool / "cluster/1"
    (inner / "out").symlink_to(follower.outside)
    (inner / "file").symlink_to(follower.outside / "precious")
    os.link(follower.outside / "precious", inner / "hard")
    os.mkfifo(inner / "pipe")
    master.hold(SPOOL, b"out/x", b"through a link")
    follower.tells("out/x", "symbolic link")
    for name in (b"file", b"hard", b"pipe"):
        master.hold(SPOOL, name, b"new " + name)
        arrives(follower, name.decode(), b"new " + name)
    # Mode and time of what has another name outside are changed on a copy.
    os.unlink(inner / "hard")
    os.link(follower.outside / "precious", inner / "hard")
    os.chmod(follower.outside / "precious", 0o600)
    master.hold(SPOOL, b"hard", b"precious", mode=0o666)
    arrives(follower, "hard", b"precious")
    assert (follower.outside / "precious").stat().st_mode & 0o777 == 0o600
    unharmed(follower, {f"spool/cluster/1/{name}" for name in ("out", "file", "hard", "pipe")})


@pytest.mark.campaign
def test_sizes_that_lie_are_not_placed_and_cost_little(world: World) -> None:
    master, _, follower = world
    master.hold(SPOOL, b"short", b"x" * 1000, size=5)
    master.hold(SPOOL, b"long", b"x" * 1001, size=900_000)
    master.hold(SPOOL, b"grows", b"x" * (3 << 20), size=2 << 20)
    master.hold(CONFIG, b"main.cf", b"config", size=3)
    master.hold(CONFIG, b"conf.d/times", b"times", mtime_ns=(1 << 63) - 1)
    eventually(lambda: master.calls.count("files.contents") > 2)
    begun = follower.cpu_s()
    time.sleep(4)
    assert follower.cpu_s() - begun < 2.0, "it is tried again without a pause"
    assert not (follower.etc / "main.cf").exists()
    unharmed(follower, {"etc/conf.d/times"})
    stage = follower.spool / "cluster/1/.pmgsync/stage"
    assert sum(path.stat().st_size for path in stage.iterdir()) <= 3 << 20
    master.hold(SPOOL, b"spam/honest", b"honest")
    arrives(follower, "spam/honest", b"honest")


WRONG: dict[str, list[tuple[int, bool]]] = {
    "another content": [(0, True)],
    "a hole": [(500, True)],
    "twice": [(0, False), (0, False)],
    "an offset without end": [(1 << 62, True)],
    "never the last": [(0, False)],
    "gone": [(-1, True)],
}
"""What is sent of a file of 2000 bytes: offset, and whether it is said to be the end."""


def _wrong(owner: FakeOwner, peer: bytes, message: Message) -> bool:
    """Answer a call for contents wrongly, each in another way."""
    if message["method"] != "files.contents" or message["args"]["tree"] != SPOOL:
        return False
    for number, (name, _, _) in enumerate(message["args"]["items"]):
        for offset, last in WRONG[name.decode()]:
            data = b"" if offset < 0 else os.urandom(2000)
            parts = [[number, offset, len(data), last]]
            owner.piece(peer, message["id"], data, kind="contents", parts=parts)
    owner.say(peer, "done", message["id"], result={"files": 1})
    return True


def test_pieces_that_do_not_fit_are_not_placed(world: World) -> None:
    master, _, follower = world
    master.answer = _wrong
    for how in WRONG:
        master.hold(SPOOL, how.encode(), how.encode().ljust(2000, b"."))
    eventually(lambda: master.calls.count("files.contents") > 3)
    unharmed(follower, set())
    master.answer = lambda *_: False
    for how in WRONG:
        arrives(follower, how, how.encode().ljust(2000, b"."), within_s=80)


MALFORMED: dict[str, Any] = {
    "a number that was not asked for": [[1, 0, 3, True]],
    "a negative number": [[-1, 0, 3, True]],
    "a size that is not there": [[0, 0, 1 << 40, True]],
    "a negative size": [[0, 0, -3, True]],
    "texts": [["0", "0", "3", "1"]],
    "no list": 7,
    "nothing": None,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_pieces_that_cannot_be_read_are_refused(what: str) -> None:
    message = {"op": "data", "piece": {"kind": "contents", "parts": MALFORMED[what]}}
    with pytest.raises(ProtocolError):
        tree_client._parts(message, b"abc", 0, 1)
    assert tree_client._parts({"piece": {"parts": [[0, 0, 3, True]]}}, b"abc", 5, 6) == [(5, 0, 3, True)]


def flood(owner: FakeOwner, peer: bytes, request: int, data: bytes, count: int, **piece: Any) -> None:
    """Send without regard to credit, until the connection takes no more."""
    with contextlib.suppress(zmq.ZMQError):
        for _ in range(count):
            owner.piece(peer, request, data, **piece)


@pytest.mark.campaign
def test_an_answer_without_end_is_cut_off(world: World) -> None:
    master, _, follower = world
    before = follower.rss_mib()

    def answer(owner: FakeOwner, peer: bytes, message: Message) -> bool:
        if message["method"] != "files.contents" or message["args"]["tree"] != SPOOL:
            return False
        flood(owner, peer, message["id"], bytes(1 << 20), 400, kind="contents", parts=[[0, 0, 1 << 20, False]])
        return True

    master.answer = answer
    master.hold(SPOOL, b"endless", b"x" * 5000)
    follower.tells("more came in answer to a call than was asked for")
    highest = 0.0
    for _ in range(20):
        highest = max(highest, follower.rss_mib())
        time.sleep(0.1)
    assert highest - before < GROWN_MIB
    unharmed(follower, set())
    master.answer = lambda *_: False
    arrives(follower, "endless", b"x" * 5000, within_s=90)


def _without_end(how: str, owner: FakeOwner, peer: bytes, message: Message) -> bool:
    """Answer with more sums, or more entries, than there can be."""
    if message["method"] != how or message["args"]["tree"] != SPOOL:
        return False
    if how == "files.sums":
        for _ in range(3):
            owner.piece(peer, message["id"], bytes(1 << 20), kind="sums")
    else:
        groups = set(message["args"]["buckets"])
        names = (b"%d" % number for number in range(60_000))
        found: list[Change] = [(name, entry_of(b"many")) for name in names if bucket_of(name) in groups]
        for start in range(0, len(found), 1000):
            owner.piece(peer, message["id"], pack_changes(found[start : start + 1000]), kind="entries")
    owner.say(peer, "done", message["id"], result={"digest": 1 << 40, "entries": 1})
    return True


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["files.sums", "files.entries", "many"])
def test_manifests_without_end_are_refused(world: World, how: str) -> None:
    master, _, follower = world
    before = follower.rss_mib()
    if how == "many":
        # Well-formed in every part, and ten times what the profile allows.
        names = (b"many/%d" % number for number in range(20_000))
        master.trees[SPOOL] = Manifest((name, entry_of(b"many")) for name in names)
    else:
        master.answer = partial(_without_end, how)
    master.announce(SPOOL, [], digest=os.urandom(16))
    if how == "files.entries":
        master.change(SPOOL, [(b"%d" % number, entry_of(b"x")) for number in range(300)])
    follower.tells("node 1", "sums" if how == "files.sums" else "more than 2000 entries")
    assert follower.rss_mib() - before < GROWN_MIB
    unharmed(follower, set())
    master.answer = lambda *_: False
    master.trees[SPOOL] = Manifest()
    master.hold(SPOOL, b"spam/first", b"first")
    master.hold(SPOOL, b"spam/honest", b"honest")
    arrives(follower, "spam/honest", b"honest", within_s=90)


@pytest.mark.campaign
def test_nobody_speaks_for_anothers_tree_and_a_flood_of_words_is_bounded(world: World) -> None:
    master, third, follower = world
    master.hold(CONFIG, b"main.cf", b"the master's")
    eventually((follower.etc / "main.cf").exists)
    before = follower.rss_mib()
    deadline = time.monotonic() + 12
    while time.monotonic() < deadline:
        third.hold(CONFIG, b"main.cf", b"the third's %d" % time.monotonic_ns())
        third.hold(SPOOL, b"spam/first", b"the third's")
        third.hold("/spool/cluster/2", b"x", b"x")
        third.announce("/spool/cluster/77", [row(b"x")])
        for _ in range(20):
            third.event(b"t", os.urandom(60_000))
            third.event(b"t", os.urandom(70_000))
            third.event(b"t", b"")
        time.sleep(0.1)
    follower.tells("node 3")
    assert follower.rss_mib() - before < GROWN_MIB
    assert (follower.etc / "main.cf").read_bytes() == b"the master's"
    assert set(third.calls) <= {"files.sums"}, "its own tree is asked for, and nothing of others'"
    unharmed(follower, {"etc/main.cf"})
    assert len(follower.log.read_text()) < 200_000
    third.hold("/spool/cluster/3", b"own", b"its own")
    eventually((follower.spool / "cluster/3/own").exists, what="its own tree; " + follower.told())
