"""The roster: the cluster document that this broker goes by, as it is on disk, and who it says is who."""

from __future__ import annotations

from broker.cluster.state_directory import NodeKeys, StateDirectory
from pmgsync.core.membership import (
    ClusterDocument,
    SignedDocument,
    accept_document,
    no_cluster,
    require_master,
    sign,
)


class Roster:
    """Holds the document in force. Nothing changes but by `load`, after the file has changed."""

    def __init__(self, state: StateDirectory, keys: NodeKeys) -> None:
        self._state = state
        self._keys = keys
        self._stamp = 0
        self.signed: SignedDocument | None = None
        self.cid = 0

    @property
    def document(self) -> ClusterDocument:
        """The document in force.

        Raises:
            MembershipError: when no cluster is defined.
        """
        if self.signed is None or not self.cid:
            raise no_cluster()
        return self.signed.document

    def master_document(self) -> ClusterDocument:
        """The document in force, on the master only.

        Raises:
            MembershipError: on any other node.
        """
        return require_master(self.document, self.cid)

    def cid_of_key(self, key: bytes) -> int:
        """Return the CID of the member with a CURVE public key, 0 for a stranger."""
        member = self.signed.document.by_key(key) if self.signed is not None and self.cid else None
        return member.cid if member else 0

    def load(self) -> tuple[SignedDocument | None, int]:
        """Read the document on disk and return it with this node's CID in it (0: not a member).

        Raises:
            ConfigError: when the file is damaged.
        """
        self._stamp = self._read_stamp()
        signed = self._state.document()
        return signed, self._state.own_cid(signed.document) if signed else 0

    def changed_on_disk(self) -> bool:
        """Return True when the file is not the one that `load` has read."""
        return self._read_stamp() != self._stamp

    def store_change(self, document: ClusterDocument) -> SignedDocument:
        """Sign a new document and store it.

        Raises:
            ConfigError: when it cannot be written.
        """
        signed = sign(document, self.cid, self._keys.sign_private)
        self._state.store_document(signed)
        return signed

    def store_offered(self, data: bytes) -> bool:
        """Store a document from the network when it is newer and properly signed; False when it is not newer.

        Raises:
            PmgsyncError: when it is not acceptable.
        """
        offered = SignedDocument.unpack(data)
        if self.signed is None or not accept_document(self.signed.document, offered):
            return False
        self._state.store_document(offered)
        return True

    def forget_stamp(self) -> None:
        """Have the next look at the file find a change, because what was loaded could not be put in force."""
        self._stamp = -1

    def _read_stamp(self) -> int:
        try:
            return self._state.document_path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0
