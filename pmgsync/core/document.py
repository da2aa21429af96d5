"""The cluster document: who is a member, who is master, in which epoch, and how that came about. Pure values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pmgsync.core.members import KEY_BYTES, Member
from pmgsync.core.nesting import check_nesting
from pmgsync.core.positions import MAX_LSN, format_lsn
from pmgsync.core.synchronous import OFF, Setting
from pmgsync.core.votes import Vote
from pmgsync.errors import ProtocolError

MAX_MEMBERS = 64
MAX_REASON = 500
"""Characters of the reason that an epoch was begun for."""
FENCES = frozenset({"lease", "none"})
LEASE_MS = 10_000
"""Default length of the master's lease, the same on all members of a cluster for good."""
SHORTEST_LEASE_MS = 1_000
LONGEST_LEASE_MS = 300_000
_LARGEST = 2**62


class Fork(NamedTuple):
    """A place on one life of a chain: as an epoch's fork, what is after `lsn` does not count."""

    incarnation: int
    lsn: int

    def __str__(self) -> str:
        return format_lsn(self.lsn)


@dataclass(frozen=True, slots=True)
class Epoch:
    """One entry of the history: one master's time.

    Attributes:
        master: CID.
        fork: on the chain of the master before; None when the master stayed the same.
        forced: begun by an administrator without a majority.
        votes: of a majority of the members that had a vote in the document it was made from; perhaps none when forced.
        when: µs since 1970 by the new master's clock.
        reason: for people.
        over: (epoch, master) of forced epochs elsewhere that this one was decided to replace.
        start: on the new master's own chain, where its time as master begins; None: with the chain.
        extra: keys of a later version; kept, so that the entry stays what it was signed as.
    """

    epoch: int
    master: int
    fork: Fork | None = None
    forced: bool = False
    votes: tuple[Vote, ...] = ()
    when: int = 0
    reason: str = ""
    over: tuple[tuple[int, int], ...] = ()
    start: Fork | None = None
    extra: tuple[tuple[str, Any], ...] = ()

    def to_map(self) -> dict[str, Any]:
        return {
            **dict(self.extra),
            "epoch": self.epoch,
            "master": self.master,
            "fork": _fork_map(self.fork),
            "forced": self.forced,
            "votes": [vote.to_map() for vote in self.votes],
            "when": self.when,
            "reason": self.reason,
            "over": [list(one) for one in self.over],
            "start": _fork_map(self.start),
        }

    @classmethod
    def from_map(cls, data: Mapping[str, Any]) -> Epoch:
        """Return the epoch a map describes; what is missing was not known to the version that wrote it.

        Raises:
            ProtocolError: when a value is not what PROTOCOL.md, section 7, says.
        """
        if not isinstance(data, Mapping):
            raise ProtocolError("a cluster document's history is not a list of maps")
        known = {"epoch", "master", "fork", "forced", "votes", "when", "reason", "over", "start"}
        epoch, master, when = data.get("epoch"), data.get("master"), data.get("when", 0)
        forced, reason, votes = data.get("forced", False), data.get("reason", ""), data.get("votes", [])
        if type(epoch) is not int or type(master) is not int or not (_positive(epoch) and _positive(master)):
            raise ProtocolError(f"an epoch's number or master is {epoch!r:.40}, {master!r:.40}")
        if type(when) is not int or not 0 <= when < _LARGEST or type(forced) is not bool:
            raise ProtocolError(f"epoch {epoch} has a time or a mark that cannot be read")
        if not isinstance(reason, str) or len(reason) > MAX_REASON:
            raise ProtocolError(f"the reason of epoch {epoch} is not a text of at most {MAX_REASON} characters")
        if not isinstance(votes, list) or not all(isinstance(vote, Mapping) for vote in votes):
            raise ProtocolError(f"the votes of epoch {epoch} are not a list of maps")
        return cls(
            epoch,
            master,
            _read_fork(epoch, data.get("fork")),
            forced,
            tuple(Vote.from_map(vote) for vote in votes),
            when,
            reason,
            _read_over(epoch, data.get("over", [])),
            _read_fork(epoch, data.get("start")),
            tuple(sorted((key, value) for key, value in data.items() if key not in known)),
        )


def _positive(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _fork_map(fork: Fork | None) -> dict[str, int] | None:
    return None if fork is None else {"incarnation": fork.incarnation, "lsn": fork.lsn}


def _read_fork(epoch: int, value: object) -> Fork | None:
    match value:
        case None:
            return None
        case {"incarnation": int(incarnation), "lsn": int(lsn)} if 0 <= incarnation < 2**63 and 0 <= lsn <= MAX_LSN:
            return Fork(incarnation, lsn)
    raise ProtocolError(f"a place on a chain in epoch {epoch} is {value!r:.80}")


def _read_over(epoch: int, value: object) -> tuple[tuple[int, int], ...]:
    if isinstance(value, list):
        pairs = [tuple(one) for one in value if isinstance(one, list) and len(one) == 2 and all(map(_positive, one))]
        if len(pairs) == len(value):
            return tuple((one[0], one[1]) for one in pairs)
    raise ProtocolError(f"what epoch {epoch} replaces is {value!r:.80}")


@dataclass(frozen=True, slots=True)
class ClusterDocument:
    """The cluster as all members agree on it; a change makes a new one with a greater (epoch, serial).

    Attributes:
        max_cid: the highest CID ever given out.
        history: one entry an epoch, oldest first; the last is this document's.
        rekeyed: SHA-256 of the bodies of the documents before and after each change of the master's signing key, the
            newest; this one is not among them.
        fence: `lease`: the master writes only while a majority acknowledges it. `none`: it always writes.
        fence_wanted: the setting of the node that created the cluster; `lease` comes in force with the third voter.
        removed: CURVE public keys of nodes that were removed, the newest last: one that was away then is told so.
        synchronous: commits on the master wait for slaves.
        synchronous_wanted: the setting; it comes in force when enough slaves are in step.
    """

    cluster: bytes
    name: str
    profile: str
    epoch: int
    serial: int
    master: int
    max_cid: int
    members: tuple[Member, ...]
    history: tuple[Epoch, ...]
    fence: str = "none"
    lease_ms: int = LEASE_MS
    fence_wanted: str = "lease"
    rekeyed: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    synchronous: bool = False
    synchronous_wanted: Setting = OFF

    @property
    def version(self) -> tuple[int, int]:
        return self.epoch, self.serial

    @property
    def forced(self) -> bool:
        """True when this epoch was begun without a majority."""
        return self.history[-1].forced

    def member(self, cid: int) -> Member | None:
        """Return the member with this CID."""
        return next((member for member in self.members if member.cid == cid), None)

    def by_key(self, curve_key: bytes) -> Member | None:
        """Return the member with this CURVE public key."""
        return next((member for member in self.members if member.curve_key == curve_key), None)

    @property
    def joining(self) -> frozenset[int]:
        """Those whose copy is not in place yet."""
        return frozenset(member.cid for member in self.members if member.state == "joining")

    @property
    def databases(self) -> frozenset[int]:
        """CIDs of the members that have a database whose copy is in place: all but witnesses and who is joining."""
        return frozenset(member.cid for member in self.members if member.votes and member.role != "witness")

    @property
    def slaves(self) -> frozenset[int]:
        """CIDs of the members that have a database whose copy is in place, but the master."""
        return self.databases - {self.master}

    def is_witness(self, cid: int) -> bool:
        """True when a member is a witness."""
        member = self.member(cid)
        return member is not None and member.role == "witness"

    @property
    def cids(self) -> frozenset[int]:
        return frozenset(member.cid for member in self.members)

    @property
    def voters(self) -> frozenset[int]:
        """CIDs of the members whose votes and acknowledgements count: witnesses do, who is joining does not."""
        return frozenset(member.cid for member in self.members if member.votes)

    @property
    def majority(self) -> int:
        """How many voters are more than half of them."""
        return len(self.voters) // 2 + 1

    def is_majority(self, cids: Iterable[int]) -> bool:
        """True when these members, as far as they have a vote, are more than half of those who have one."""
        return len(self.voters.intersection(cids)) >= self.majority

    def to_json(self) -> bytes:
        """Return the bytes that are signed."""
        body = {
            "cluster": self.cluster.hex(),
            "name": self.name,
            "profile": self.profile,
            "epoch": self.epoch,
            "serial": self.serial,
            "master": self.master,
            "max_cid": self.max_cid,
            "members": [member.to_map() for member in self.members],
            "history": [entry.to_map() for entry in self.history],
            "fence": self.fence,
            "fence_wanted": self.fence_wanted,
            "lease_ms": self.lease_ms,
            "rekeyed": [one.hex() for one in self.rekeyed],
            "removed": [one.hex() for one in self.removed],
            "synchronous": self.synchronous,
            "synchronous_wanted": self.synchronous_wanted.to_map(),
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, body: bytes) -> ClusterDocument:
        """Return the document in JSON text. Keys that are not known here are ignored.

        Raises:
            ProtocolError: when it is not a document that PROTOCOL.md, section 7, allows.
        """
        try:
            data = json.loads(body)
            check_nesting(data)
            cluster = bytes.fromhex(data["cluster"])
            members = tuple(Member.from_map(entry) for entry in data["members"])
            history = tuple(Epoch.from_map(entry) for entry in data["history"])
            epoch, serial, master, max_cid = numbers = [data["epoch"], data["serial"], data["master"], data["max_cid"]]
            name, profile = data["name"], data["profile"]
            rekeyed, removed = (tuple(map(bytes.fromhex, data.get(key, []))) for key in ("rekeyed", "removed"))
            fence, lease_ms = data.get("fence", "none"), data.get("lease_ms", LEASE_MS)
            fence_wanted = data.get("fence_wanted", "lease")
            synchronous = data.get("synchronous", False)
            synchronous_wanted = Setting.from_map(data.get("synchronous_wanted", OFF.to_map()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"a cluster document cannot be read ({type(error).__name__}: {error})") from error
        if not all(_positive(number) for number in numbers):
            raise ProtocolError("a cluster document's epoch, serial, master and max_cid are not positive integers")
        if len(cluster) != 16 or not (isinstance(name, str) and isinstance(profile, str)):
            raise ProtocolError("a cluster document's id, name or profile is malformed")
        if type(synchronous) is not bool:
            raise ProtocolError(f"a cluster document's synchronous is {synchronous!r:.40}, expected true or false")
        for one in (fence, fence_wanted):
            if not isinstance(one, str) or one not in FENCES:
                raise ProtocolError(f"a cluster document's fence is {one!r:.40}, expected one of {sorted(FENCES)}")
        if type(lease_ms) is not int or not SHORTEST_LEASE_MS <= lease_ms <= LONGEST_LEASE_MS:
            raise ProtocolError(
                f"a cluster document's lease_ms is {lease_ms!r:.40}, expected {SHORTEST_LEASE_MS} to {LONGEST_LEASE_MS}"
            )
        document = cls(
            cluster, name, profile, epoch, serial, master, max_cid, members, history, fence, lease_ms, fence_wanted,
            rekeyed, removed, synchronous, synchronous_wanted,
        )  # fmt: skip
        if any(len(one) != 32 for one in rekeyed):
            raise ProtocolError("a cluster document names another document by something that is no SHA-256")
        if any(len(one) != KEY_BYTES for one in removed):
            raise ProtocolError("a cluster document names a removed node by something that is no key")
        document._check()
        return document

    def _check(self) -> None:
        if not 0 < len(self.members) <= MAX_MEMBERS:
            raise ProtocolError(f"a cluster document has {len(self.members)} members, expected 1 to {MAX_MEMBERS}")
        for what, values in (
            ("CID", [member.cid for member in self.members]),
            ("name", [member.name for member in self.members]),
            ("key", [member.curve_key for member in self.members]),
            ("address", [(member.address, member.control) for member in self.members]),
        ):
            if len(set(values)) != len(values):
                raise ProtocolError(f"a cluster document has two members with one {what}")
        if self.max_cid < max(self.cids):
            raise ProtocolError("a cluster document's max_cid is below a member's CID")
        if [member.cid for member in self.members if member.role == "master"] != [self.master]:
            raise ProtocolError("a cluster document's master is not its one member with the role master")
        if self.master not in self.voters:
            raise ProtocolError("a cluster document's master is joining")
        epochs = [entry.epoch for entry in self.history]
        if not epochs or epochs != sorted(set(epochs)):
            raise ProtocolError("a cluster document's history is empty or not in order")
        if (self.history[-1].epoch, self.history[-1].master) != (self.epoch, self.master):
            raise ProtocolError("a cluster document's history does not end with its epoch and master")
