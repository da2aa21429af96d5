"""`pmgcm sync`: has this node follow a master that it has not heard of, when the administrator says where that is.

The others learn of a new epoch by themselves when they are reached. This is for a node that knows no address by which
it could be: the document that it gets there proves itself, by the votes in it, or by what was signed before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import say
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError

if TYPE_CHECKING:
    from broker.cluster.documents import Documents
    from pmgsync.core.document import ClusterDocument
    from pmgsync.core.members import Member
    from pmgsync.core.signed import SignedDocument

CONTROL_PORT, KEY_PORT = 7671, 7673


def sync(
    context: typer.Context,
    master_ip: Annotated[
        str | None, typer.Option("--master_ip", "--master-ip", metavar="IP", help="Where the master is")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Its control port; default: as this node knows it, or 7671")] = None,
    key_port: Annotated[int, typer.Option(help="Its key port, when it is no member that is known here")] = KEY_PORT,
) -> None:
    """Ask the node at an address for the cluster document, and follow it when it is the master of this node's cluster.

    Without an address: the master that this node knows of."""
    from cli.local_node import broker, cluster_defined, held_documents, load
    from pmgsync.core.membership import no_cluster

    config = load(context)
    if not cluster_defined(config):
        if master_ip is None:
            raise MembershipError("no master IP specified (use option --master_ip)", hint=no_cluster().message)
        raise no_cluster()
    documents = held_documents(config)
    own = documents.document.member(documents.cid)
    assert own is not None
    asked = find_member(documents.document, master_ip, port)
    if own.cid == documents.document.master and (asked == own or (asked is None and master_ip == own.address)):
        say("local node is master - nothing to do")
        return
    if asked == own:
        raise MembershipError(f"{own.address} is this node itself, which is not the master")
    address = asked.address if asked is not None else str(master_ip)
    signed = fetch_document(documents, asked, address, port or CONTROL_PORT, key_port)
    with broker(config) as link:
        answer, _ = link.request({"op": "document.offer"}, signed.pack())
    result = answer["result"]
    master = signed.document.member(signed.document.master)
    assert master is not None
    if not result["taken"] and signed.document.version < documents.document.version:
        raise MembershipError(
            f"the node at {address} has an older cluster document than this node, of epoch {signed.document.epoch}",
            hint=f"this node knows of epoch {result['epoch']}; `pmgcm history` says more",
        )
    say(f"this node follows {master.name} ({master.cid}), the master of epoch {signed.document.epoch}")


def find_member(document: ClusterDocument, address: str | None, port: int | None) -> Member | None:
    """Return the member that is meant: the master when no address is given. None: nobody who is known here."""
    if address is None:
        return document.member(document.master)
    there = [
        member for member in document.members if member.address == address and (port is None or member.control == port)
    ]
    return there[0] if len(there) == 1 else next((one for one in there if one.role == "master"), None)


def fetch_document(
    documents: Documents, member: Member | None, address: str, port: int, key_port: int
) -> SignedDocument:
    """Return the document of the node at an address, which is the master that the document names, of this cluster.

    Raises:
        MembershipError: when it is anything else.
        UnreachableError: when nobody answers there.
    """
    from broker.cluster.door_client import fetch_key
    from broker.cluster.remote import remote_control

    control = member.control if member is not None else port
    keys: list[Callable[[], bytes]] = [lambda: fetch_key(address, key_port)]
    if member is not None:
        known = member.curve_key
        keys.insert(0, lambda: known)
    for number, key_of in enumerate(keys):
        try:
            key = key_of()
            with remote_control(f"the node at {address}:{control}", address, control, key, documents.keys) as peer:
                _, parts = peer.request({"op": "document"})
            break
        except MembershipError as error:
            # It may have another key by now, or be another machine at that address.
            if number == len(keys) - 1:
                raise MembershipError(
                    f"the node at {address}:{control} does not know this node, or is another than this node expects",
                    hint="it is of another cluster, or this node was deleted there; check the address",
                ) from error
        except ProtocolError as error:
            raise MembershipError(
                f"what answers at {address} is not the master of a cluster of pmgsync", hint=error.hint
            ) from error
    if len(parts) != 1:
        raise ProtocolError(f"the node at {address}:{control} answered without a cluster document")
    return proved(documents, f"the node at {address}:{control}", _read(parts[0]), key)


def _read(data: bytes) -> SignedDocument:
    from pmgsync.core.signed import SignedDocument

    return SignedDocument.unpack(data)


def proved(documents: Documents, where: str, signed: SignedDocument, key: bytes) -> SignedDocument:
    """Return a document that follows from the one held here, and whose master is the node that has sent it.

    Args:
        key: CURVE public key of the node that has sent it.

    Raises:
        MembershipError: when it is not so.
    """
    from pmgsync.core.signed import accept_document

    held, document = documents.document, signed.document
    if document.cluster != held.cluster:
        raise MembershipError(f"{where} is of another cluster, {document.name!r}")
    sender, master = document.by_key(key), document.member(document.master)
    if sender is None or master is None or sender.cid != master.cid:
        name = f"{master.name} ({master.address})" if master is not None else "another node"
        raise MembershipError(f"{where} is not the master", hint=f"it says that {name} is; give that address")
    if document.member(documents.cid) is None:
        raise MembershipError(f"{where} is the master of this node's cluster, but has removed this node from it")
    try:
        accept_document(held, signed)
    except PmgsyncError as error:
        raise MembershipError(
            f"{where} cannot prove that it is the master: {error.message}", hint=error.hint
        ) from error
    return signed
