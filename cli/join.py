"""`pmgcm join`: makes this node a member of an existing cluster; its database becomes a copy of the master's.

The order is the point: everything that can be checked is checked before the master is asked to admit this node, and the
old database is dropped only when the copy is complete. Whatever fails, or is interrupted, leaves this node as it was.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import confirm, note, say
from pmgsync.errors import PmgsyncError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from broker.net.keys import NodeKeys
    from pmgsync.config import NodeConfig
    from pmgsync.core.membership import Member, SignedDocument
    from pmgsync.core.profile import Profile
    from pmgsync.postgres.copy.database_restore import DatabaseRestore

DEFAULT_PORT = 7672
DEFAULT_KEY_PORT = 7673
BEGIN_S = 20.0
"""The master's agent may be taking notice of its new member when the snapshot is asked for."""
BEGIN_AGAIN_S = 0.5


def join(
    context: typer.Context,
    master_ip: Annotated[str, typer.Argument(metavar="MASTER_IP", help="The master's address")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The master's join port")] = DEFAULT_PORT,
    fingerprint: Annotated[str | None, typer.Option(help="The master's key, as `pmgcm join-cmd` prints it")] = None,
    token: Annotated[str | None, typer.Option(help="One-time word from `pmgcm join-cmd`")] = None,
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its first line is the password of root on the master")
    ] = None,
    key_port: Annotated[
        int, typer.Option(min=1, max=65535, help="The master's key port, asked when no fingerprint is given")
    ] = DEFAULT_KEY_PORT,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before this node's database is replaced")] = False,
    witness: Annotated[bool, typer.Option("--witness", help="Have a vote only: no database and no agent")] = False,
) -> None:
    """Join a cluster: this node's database becomes a copy of the master's. Nothing changes unless all goes well.

    Asks for the password of root on the master, or a token, unless one is given.
    """
    from broker.cluster.door_client import DoorClient
    from broker.cluster.identity import own_member
    from broker.cluster.remote import JoinReporter
    from broker.cluster.state_directory import StateDirectory
    from cli.join_checks import announcement, check_here, check_there
    from cli.join_proof import proof, server_key
    from cli.local_node import change_cluster, held_documents, load
    from cli.services import stopped
    from cli.witness import join_as_witness
    from pmgsync.profile_file import load_profile

    config = load(context)
    state = StateDirectory(config.state_dir)
    held_documents(config).refuse_second()
    if witness:
        join_as_witness(
            config, master_ip, port, key_port,
            fingerprint=fingerprint, token=token, password_file=password_file, yes=yes,
        )  # fmt: skip
        return
    profile = load_profile(config.profile)
    master_key = server_key(master_ip, key_port, fingerprint, yes=yes)
    here = check_here(config, profile)
    proved = proof(token, password_file)
    keys = state.keys()
    own = own_member(config, keys)
    with DoorClient(master_ip, port, master_key, keys) as door:
        asked = time.time()
        facts = door.check(own, **proved)
        clock_ahead_s = _clock_ahead_s(facts, asked, time.time())
        check_there(config, profile, here, facts)
    note(announcement(config, here, facts, clock_ahead_s=clock_ahead_s))
    if not yes:
        confirm("Go on?")
    with _restore(config, facts) as restore:
        # A connection of its own: whoever answers the question may take longer than a connection lasts.
        with DoorClient(master_ip, port, master_key, keys) as door:
            cid, signed = door.admit(str(facts.get("token", "")), own)
        master = signed.document.member(signed.document.master)
        assert master is not None
        with JoinReporter(master, keys, restore.progress):
            _copy(restore, master, keys)
            with stopped(profile.services, config.state_dir):
                _take_place(config, profile, restore, signed, cid, had_node=here.server.was_member)
                change_cluster(
                    config,
                    {"op": "cluster.enter"},
                    signed.pack(),
                    offline=lambda documents: documents.enter(signed),
                    done=lambda documents: documents.is_member_of(signed.document.cluster),
                )
    say(f"this node is {config.name}({cid}) in the cluster {signed.document.name!r}")
    if profile.files:
        say("files come in the background, none of a spool is removed for them; `pmgcm files` shows how far they are")


def _clock_ahead_s(facts: Mapping[str, object], asked: float, answered: float) -> float | None:
    """Return by how much the master's clock is ahead, at least, given when it was asked and had answered here."""
    told = facts.get("time")
    if type(told) is not int:
        return None
    ahead, behind = told / 1e6 - answered, asked - told / 1e6
    return ahead if ahead > 0 else -behind if behind > 0 else 0.0


@contextlib.contextmanager
def _restore(config: NodeConfig, facts: dict[str, object]) -> Iterator[DatabaseRestore]:
    """Yield the new, empty database beside the old one; it is removed again unless it has taken the old one's place."""
    from pmgsync.postgres.copy.database_restore import DatabaseRestore

    restore = DatabaseRestore(config.dsn, facts)
    try:
        restore.begin()
        yield restore
    except BaseException as error:
        try:
            restore.abandon()
        except PmgsyncError as second:
            error.add_note(f"the unfinished copy could not be removed now ({second}); the next join does it")
        if isinstance(error, PmgsyncError):
            error.add_note("this node's database is as it was")
        raise


def _copy(restore: DatabaseRestore, master: Member, keys: NodeKeys) -> None:
    """Fill the new database with a snapshot of the master's.

    Raises:
        PmgsyncError: when it did not come whole.
    """
    from broker.cluster.remote import remote_member
    from cli.progress import SnapshotProgress
    from pmgsync.wire.snapshot import fetch_snapshot

    deadline = time.monotonic() + BEGIN_S
    while True:
        try:
            with remote_member(master, keys) as peer, SnapshotProgress() as progress:
                fetch_snapshot(
                    peer,
                    {"scope": "database"},
                    restore,
                    on_message=lambda: progress.show(restore.bytes, restore.rows, restore.plan.get("bytes", 0)),
                    waiting=progress.waiting,
                )
            return
        except UnreachableError:
            if restore.bytes or time.monotonic() > deadline:
                raise
            time.sleep(BEGIN_AGAIN_S)


def _take_place(
    config: NodeConfig, profile: Profile, restore: DatabaseRestore, signed: SignedDocument, cid: int, *, had_node: bool
) -> None:
    """Make the new database this node's own, and put it in the old one's place."""
    from pmgsync.postgres.setup.guard import ensure_guard
    from pmgsync.postgres.setup.provision import deprovision, provision

    if had_node:
        # Its slot has the name that the new one needs; nobody has read it since this node left its cluster.
        deprovision(config.dsn)
    provision(
        restore.dsn,
        profile,
        cid=cid,
        cluster=signed.document.cluster,
        needs_snapshot=False,
        take_over_cid0=False,
        progress=note,
    )
    try:
        # The agent would do it too, but seconds later; what is written until then would be on this node alone.
        ensure_guard(restore.dsn, profile, master=signed.document.member(signed.document.master))
        restore.swap()
    except BaseException:
        # A database with a slot cannot be dropped while that slot is in use.
        with contextlib.suppress(PmgsyncError):
            deprovision(restore.dsn)
        raise
