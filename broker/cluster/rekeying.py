"""What a change of this node's keys needs beside the document: the new keys on disk first, and the old ones for those
who were away.

A document names the keys that count. It may not have reached everybody when a node or the network fails: then this node
is a stranger to whoever has the other document. With the keys that it does not use now it is a member there, and the
two exchange documents over one short connection. So a crash at any step of a change heals by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import zmq

from broker.cluster.state_directory import StateDirectory
from broker.members.connection import Connection
from broker.members.link import MemberLink
from broker.members.members import Members
from broker.net.keys import KeyPair, NodeKeys
from broker.net.loop import Loop, Socket
from pmgsync.core.membership import ClusterDocument, SignedDocument
from pmgsync.errors import PmgsyncError
from pmgsync.wire.messages import pack, unpack

log = logging.getLogger(__name__)

EXCHANGE_S = 2.0
"""So long a connection for an exchange may last."""
AGAIN_S = 1.0
"""Seconds between two exchanges with the same member."""


class Rekeying:
    """The keys of this node that are not in use."""

    def __init__(
        self,
        state: StateDirectory,
        keys: NodeKeys,
        context: zmq.Context[Socket],
        loop: Loop,
        members: Members,
        *,
        signed: Callable[[], SignedDocument],
        offer_document: Callable[[int, bytes], None],
    ) -> None:
        """Begin.

        Args:
            signed: returns the cluster document in force.
            offer_document: takes the CID of a member and the packed document that it offers; raises PmgsyncError when
                it is not acceptable.
        """
        self._state = state
        self._keys = keys
        self._context = context
        self._loop = loop
        self._members = members
        self._signed = signed
        self._offer_document = offer_document
        self._heard: set[int] = set()
        self._exchanges: dict[int, _Exchange] = {}
        self._turns: dict[int, Iterator[KeyPair]] = {}
        self._written = True

    def begin(self) -> KeyPair:
        """Return the keys that this node is to have next; they are on disk. The same ones until they are in use.

        Raises:
            ConfigError: when they cannot be written.
        """
        if self._keys.pending is None:
            self._keys.pending = KeyPair.generate()
            try:
                self._state.store_keys(self._keys)
            except PmgsyncError:
                self._keys.pending = None
                raise
        return self._keys.pending

    def renewed(self) -> None:
        """Take over that this node uses other keys now: nobody is known to know them."""
        log.info("action=keys-changed fingerprint=%s", self._keys.curve_public.hex())
        self._heard.clear()
        self._turns.clear()
        self._end_exchanges()
        self._written = False
        self._write()

    def _write(self) -> None:
        """Have the file name the keys in use first. It need not: the document decides, and all of them are there."""
        try:
            self._state.store_keys(self._keys)
        except PmgsyncError as error:
            log.warning("action=keys-not-written error=%s", error)
            return
        self._written = True

    def tick(self) -> None:
        """Exchange documents with those to whom this node is a stranger, and forget old keys when nobody needs them."""
        for cid, exchange in list(self._exchanges.items()):
            if exchange.over:
                self._end(cid)
        if not list(self._keys.others):
            return
        self._heard |= {link.member.cid for link in self._members if link.up}
        if self._written and self._keys.old and self._heard >= self._others(self._signed().document):
            log.info("action=old-keys-forgotten")
            self._keys.old, self._written = (), False
        if not self._written:
            self._write()
        for link in self._members:
            if link.key_refused and link.member.cid not in self._exchanges:
                self._exchange(link)

    def _others(self, document: ClusterDocument) -> frozenset[int]:
        own = document.by_key(self._keys.curve_public)
        return document.cids - {own.cid if own is not None else 0}

    def _exchange(self, link: MemberLink) -> None:
        cid = link.member.cid
        pair = next(self._turns.setdefault(cid, cycle(list(self._keys.others))))
        self._exchanges[cid] = _Exchange(
            self._context,
            self._loop,
            pair,
            link,
            self._signed().pack(),
            take=lambda data: self._offer_document(cid, data),
        )

    def _end(self, cid: int) -> None:
        exchange = self._exchanges.pop(cid)
        exchange.close()
        link = self._members.link(cid)
        if exchange.spoken and link is exchange.link and link.key_refused:
            # It may know this node's keys by now, and libzmq does not try again.
            link.rebuild()

    def _end_exchanges(self) -> None:
        for exchange in self._exchanges.values():
            exchange.close()
        self._exchanges.clear()

    def close(self) -> None:
        """End all exchanges."""
        self._end_exchanges()


class _Exchange:
    """One short connection to a member's control port with other keys than this node's present ones.

    Attributes:
        link: the link to the member, as it was when the exchange began.
        spoken: True when the member has taken the connection.
    """

    def __init__(
        self,
        context: zmq.Context[Socket],
        loop: Loop,
        pair: KeyPair,
        link: MemberLink,
        document: bytes,
        *,
        take: Callable[[bytes], None],
    ) -> None:
        self.link = link
        self.spoken = False
        self._document = document
        self._take = take
        self._begun = time.monotonic()
        self._answered = False
        member = link.member
        self._connection = Connection(
            context, loop, pair, member, zmq.DEALER, member.control,
            receive=self._receive, begun=lambda: None, ended=lambda: None,
        )  # fmt: skip
        # Both are queued until the connection stands. The offer comes first: who takes it may cut the connection.
        self._connection.socket.send_multipart([pack({"op": "offer"}), document])
        self._connection.socket.send(pack({"op": "document", "id": 1}))

    @property
    def over(self) -> bool:
        """True when it has brought what it can, or takes too long; it is not begun again sooner than `AGAIN_S`."""
        self.spoken = self.spoken or self._connection.established or self._connection.lasted_s > 0
        age_s = time.monotonic() - self._begun
        ended = self._answered or self._connection.refused or (self.spoken and not self._connection.established)
        return age_s > EXCHANGE_S or (ended and age_s > AGAIN_S)

    def _receive(self, parts: Sequence[zmq.Frame]) -> None:
        try:
            message = unpack(parts[0].bytes)
            if message["op"] == "document" and len(parts) == 2:
                self._answered = True
                self._take(parts[1].bytes)
        except PmgsyncError as error:
            log.warning("action=refused node=%d error=%s", self.link.member.cid, error)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()
