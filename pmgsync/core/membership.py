"""Changes of the cluster document: each returns a new one, or says why not. Pure.

The names of the modules below it are offered here too: the document, its members, and what signs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pmgsync.core.document import LEASE_MS, MAX_MEMBERS, MAX_REASON, ClusterDocument, Epoch, Fork
from pmgsync.core.members import MAX_CID, Member, format_fingerprint, parse_fingerprint
from pmgsync.core.signed import MAX_DOCUMENT, SignedDocument, accept_document, sign
from pmgsync.core.synchronous import Setting
from pmgsync.core.votes import Vote
from pmgsync.errors import MembershipError

__all__ = [
    "MAX_CID",
    "MAX_DOCUMENT",
    "MAX_MEMBERS",
    "ClusterDocument",
    "Epoch",
    "Fork",
    "Member",
    "SignedDocument",
    "accept_document",
    "cuts_off",
    "first_document",
    "format_fingerprint",
    "new_epoch",
    "no_cluster",
    "parse_fingerprint",
    "require_master",
    "sign",
    "was_removed",
    "with_confirmed",
    "with_fence",
    "with_host",
    "with_keys",
    "with_member",
    "with_synchronous",
    "without_member",
]

MAX_REMOVED = 64
FORCED_CIDS = 10
"""CIDs that each member could give out by itself if it were master by force."""


def no_cluster() -> MembershipError:
    """Return the error of a node that is in no cluster."""
    return MembershipError("no cluster defined", hint="run `pmgcm create`, or `pmgcm join` to join an existing cluster")


def was_removed(document: ClusterDocument) -> MembershipError:
    """Return the error of a node that is in no cluster any more; the document is the one without it."""
    master = document.member(document.master)
    where = f" on {master.name} ({master.address})" if master is not None else ""
    return MembershipError(
        f"no cluster defined: this node was removed from the cluster {document.name!r}",
        hint="its data stays as it is, and is not kept in step any more; `pmgcm leave` here removes what the cluster "
        "has made, above all the replication slot, which keeps WAL; a line of `pmgcm join-cmd`"
        f"{where} makes it a member again",
    )


def require_master(document: ClusterDocument, cid: int) -> ClusterDocument:
    """Return the document when the node `cid` is its master.

    Raises:
        MembershipError: when it is not; the hint says where the master is.
    """
    if document.master != cid:
        master = document.member(document.master)
        raise MembershipError(
            "operation not permitted (not master)",
            hint=f"run it on {master.name} ({master.address})" if master else "",
        )
    return document


def first_document(
    cluster: bytes,
    name: str,
    profile: str,
    founder: Member,
    *,
    when: int = 0,
    fence: str = "none",
    lease_ms: int = LEASE_MS,
    fence_wanted: str = "lease",
    used: int = 0,
) -> ClusterDocument:
    """Return the first document of a cluster, of one member who is master.

    Args:
        when: µs since 1970.
        used: the highest CID that rows have from an earlier cluster; no other node gets it or a lower one.
    """
    return ClusterDocument(
        cluster,
        name,
        profile,
        1,
        1,
        founder.cid,
        max(founder.cid, used),
        (replace(founder, role="master"),),
        (Epoch(1, founder.cid, when=when, reason="created"),),
        fence=fence,
        lease_ms=lease_ms,
        fence_wanted=fence_wanted,
    )


def with_member(document: ClusterDocument, newcomer: Member) -> ClusterDocument:
    """Return the document with one more member, who gets the next CID that was never used.

    Args:
        newcomer: its CID is not looked at; it stays a witness and `joining` if it is that.

    Raises:
        MembershipError: when name, address or key belong to a member already, or the cluster is full.
    """
    for member in document.members:
        if member.curve_key == newcomer.curve_key:
            raise MembershipError(
                f"this node's key belongs to member {member.name} ({member.cid}) already",
                hint=f"run `pmgcm delete {member.cid}` on the master first",
            )
        if member.name == newcomer.name:
            raise MembershipError(
                f"a member is called {member.name} already (CID {member.cid})",
                hint=f"give the node another name, or run `pmgcm delete {member.cid}` on the master first",
            )
        if member.address == newcomer.address and {member.events, member.control, member.join} & {
            newcomer.events,
            newcomer.control,
            newcomer.join,
        }:
            raise MembershipError(
                f"address {member.address} and its ports belong to member {member.name} ({member.cid}) already",
                hint=f"run `pmgcm delete {member.cid}` on the master first",
            )
    if len(document.members) >= MAX_MEMBERS:
        raise MembershipError(f"the cluster has {MAX_MEMBERS} members, which is the most it can have")
    cid = document.max_cid + 1
    member = replace(newcomer, cid=cid, role="witness" if newcomer.role == "witness" else "node")
    removed = tuple(key for key in document.removed if key != newcomer.curve_key)
    members = (*document.members, member)
    return replace(document, serial=document.serial + 1, max_cid=cid, members=members, removed=removed)


def without_member(document: ClusterDocument, cid: int) -> ClusterDocument:
    """Return the document without a member.

    Raises:
        MembershipError: when there is no such member, or it is the master.
    """
    if document.member(cid) is None:
        raise MembershipError(f"no member has CID {cid}", hint="`pmgcm status` lists the members")
    if cid == document.master:
        raise MembershipError("unable to delete master node", hint="promote another node first")
    gone = [member.curve_key for member in document.members if member.cid == cid]
    members = tuple(member for member in document.members if member.cid != cid)
    removed = (*document.removed, *gone)[-MAX_REMOVED:]
    return replace(document, serial=document.serial + 1, members=members, removed=removed)


def with_confirmed(document: ClusterDocument, cid: int) -> ClusterDocument:
    """Return the document in which a member that was joining has a vote; the same one when it has.

    Raises:
        MembershipError: when there is no such member.
    """
    member = document.member(cid)
    if member is None:
        raise MembershipError(f"no member has CID {cid}", hint="`pmgcm status` lists the members")
    if member.votes:
        return document
    return _with_changed(document, replace(member, state="member"))


def with_keys(document: ClusterDocument, cid: int, curve_key: bytes, sign_key: bytes) -> ClusterDocument:
    """Return the document in which a member has other keys; the same one when it has these.

    Raises:
        MembershipError: when there is no such member, it is joining, or somebody else has the key.
    """
    member = document.member(cid)
    if member is None:
        raise MembershipError(f"no member has CID {cid}", hint="`pmgcm status` lists the members")
    if member.state == "joining" or (cid == document.master and document.joining):
        who = ", ".join(map(str, sorted(document.joining)))
        raise MembershipError(
            f"keys cannot be changed while node {who} is joining",
            hint="wait until `pmgcm status` shows it as a member, or delete it",
        )
    owner = document.by_key(curve_key)
    if owner is not None and owner.cid != cid:
        raise MembershipError(f"the new key of CID {cid} belongs to member {owner.name} ({owner.cid})")
    changed = replace(member, curve_key=curve_key, sign_key=sign_key)
    return _with_changed(document, changed)


def with_host(
    document: ClusterDocument, cid: int, level: str, host_keys: tuple[tuple[str, str], ...]
) -> ClusterDocument:
    """Return the document with another subscription level and other host keys of a member; the same one when it has
    these.

    Raises:
        MembershipError: when there is no such member.
    """
    member = document.member(cid)
    if member is None:
        raise MembershipError(f"no member has CID {cid}", hint="`pmgcm status` lists the members")
    return _with_changed(document, replace(member, level=level, host_keys=host_keys))


def cuts_off(before: ClusterDocument, after: ClusterDocument) -> bool:
    """True when a key that was a member's is nobody's any more: connections of it must be cut."""
    return not {one.curve_key for one in before.members} <= {one.curve_key for one in after.members}


def _with_changed(document: ClusterDocument, changed: Member) -> ClusterDocument:
    if changed in document.members:
        return document
    members = tuple(changed if one.cid == changed.cid else one for one in document.members)
    return replace(document, serial=document.serial + 1, members=members)


def with_fence(document: ClusterDocument, fence: str) -> ClusterDocument:
    """Return the document with another fence, `lease` or `none`."""
    return replace(document, serial=document.serial + 1, fence=fence)


def with_synchronous(document: ClusterDocument, setting: Setting, *, in_force: bool) -> ClusterDocument:
    """Return the document with another setting of synchronous mode, and whether it is in force; the same one when it
    says so.
    """
    if (document.synchronous_wanted, document.synchronous) == (setting, in_force):
        return document
    return replace(document, serial=document.serial + 1, synchronous=in_force, synchronous_wanted=setting)


def new_epoch(
    document: ClusterDocument,
    master: int,
    *,
    epoch: int,
    fork: Fork | None,
    when: int,
    reason: str,
    votes: Iterable[Vote] = (),
    forced: bool = False,
    over: Iterable[tuple[int, int]] = (),
    start: Fork | None = None,
) -> ClusterDocument:
    """Return the first document of a new epoch, made from the one that its votes name.

    When it is forced, CIDs are left out: the side that is not heard may have given out the next ones, and so may
    another member that is forced at the same time. Each has `FORCED_CIDS` to itself. And it is not fenced, for a
    majority is what it lacks; the fence comes back with `lease.fence_due`. Nor do its commits wait for slaves, until
    enough of them are in step.

    Args:
        master: CID of the new master; the one before becomes a slave.
        fork: on the chain of the master before, None when the master stays.
        when: µs since 1970.
        votes: of the members; whether they are a majority is checked by whoever takes the document.
        over: (epoch, master) of forced epochs elsewhere that are to give way to this one.
        start: the end of the new master's own chain, before it writes as master.

    Raises:
        MembershipError: when that node cannot be master.
    """
    member = document.member(master)
    if member is None or not member.may_be_master:
        what = "is not a member" if member is None else "is a witness" if member.role == "witness" else "is joining"
        raise MembershipError(f"CID {master} cannot be master, for it {what}")
    if epoch <= document.epoch:
        raise MembershipError(f"epoch {epoch} does not follow epoch {document.epoch}")

    def role(one: Member) -> str:
        return "master" if one.cid == master else "node" if one.role == "master" else one.role

    rank = sorted(document.cids).index(master) + 1
    return replace(
        document,
        epoch=epoch,
        serial=document.serial + 1,
        master=master,
        max_cid=document.max_cid + (FORCED_CIDS * rank if forced else 0),
        members=tuple(replace(one, role=role(one)) for one in document.members),
        fence="none" if forced else document.fence,
        synchronous=document.synchronous and not forced,
        history=(
            *document.history,
            Epoch(epoch, master, fork, forced, tuple(votes), when, reason[:MAX_REASON], tuple(over), start),
        ),
    )
