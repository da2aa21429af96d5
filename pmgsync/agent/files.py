"""The files worker: a thread for each tree, and between them and the broker announcements, calls and reports."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pmgsync.agent.actions import Actions
from pmgsync.agent.followed_tree import FollowedTree
from pmgsync.agent.owned_tree import OwnedTree
from pmgsync.agent.refusals import Refusals
from pmgsync.agent.serving import Servings
from pmgsync.agent.table_actions import TableActions
from pmgsync.agent.tree_checks import read_names, verify_tree
from pmgsync.agent.tree_client import TreeClient
from pmgsync.agent.tree_server import METHODS, answer
from pmgsync.agent.tree_thread import Place
from pmgsync.agent.worker import REPORT_S, Worker
from pmgsync.config import NodeConfig
from pmgsync.core.announcements import Announcement, in_parts
from pmgsync.core.manifests import Change, Entry, Manifest
from pmgsync.core.trees import Tree, trees_of
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError
from pmgsync.files.cache import Cache
from pmgsync.files.scan import Limits
from pmgsync.profile_file import load_profile
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message
from pmgsync.wire.waiting import Waiter

log = logging.getLogger(__name__)

ANNOUNCE_S = 2.0
"""What was published may be lost: each tree is announced again so often."""
MAX_ALERTS = 20
_ROLE = "role"
"""Where the cache has the role for which actions were asked for last; no tree is called so."""
FOREIGN_S = 8.0
"""A node that has not heard of a promotion, or of a member, speaks for trees of others for a moment."""


class FilesWorker(Worker):
    """Keeps this node's trees as their owners have them, and tells the others of its own."""

    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config, "files")
        self._profile = load_profile(config.profile)
        self._cache = Cache(config.state_dir / "files.db")
        self._owned: dict[str, OwnedTree] = {}
        self._followed: dict[str, FollowedTree] = {}
        self._published: dict[str, Manifest] = {}
        self._told: dict[str, bytes] = {}
        self._announce_due = 0.0
        self._serving = Servings(self.wakeup)
        self._applied: dict[int, int] = {}
        self._tables: TableActions | None = None
        self._runs = Actions(
            self._profile,
            self._cache,
            applied=self._is_applied,
            settled=self._are_settled,
            changed=self.wakeup.wake,
        )
        self._refusals = Refusals()

    # -- the session --------------------------------------------------------------------------------------------------

    def session(self, link: BrokerLink) -> None:
        """Serve until something ends the session; the trees go on without one."""
        link.send({"op": "serve", "methods": [*METHODS, "files.accept", "files.verify", "files.repair"]})
        self._cache.begin(f"{self.document.cluster.hex()}/{self.cid}")
        self._meet_trees()
        waiter = Waiter(link, wakeup=self.wakeup)
        try:
            while True:
                waiter.wait(REPORT_S)
                for received in link.pending():
                    self._take(link, *received)
                self._tell_changes(link)
                self._serving.send(link)
                self.recovered()
                self._describe()
                self.report()
        finally:
            self._serving.close()

    def keeps_session(self, data: bytes) -> bool:
        """A new member or role is met without a new session, unless this node leaves the cluster."""
        cluster = self.document.cluster
        super().keeps_session(data)
        if not data or self.document.cluster != cluster or self.document.member(self.cid) is None:
            self._stop_trees(set())
            return False
        self._meet_trees()
        return True

    def _take(self, link: BrokerLink, message: Message, attachments: Sequence[bytes]) -> None:
        if self._serving.take(link, message, partial(self._call, link)):
            return
        if message["op"] == "announced":
            self._hear(int(message["origin"]), attachments[0])
        else:
            self.handle(message, attachments)

    # -- trees --------------------------------------------------------------------------------------------------------

    def _meet_trees(self) -> None:
        """Have a thread for each tree, of the kind that its owner asks for."""
        self._take_role("master" if self.document.master == self.cid else "node")
        self._watch_tables(self.document.master != self.cid)
        trees = trees_of(self._profile, self.document)
        self._stop_trees(set(trees.values()))
        for tree in trees.values():
            if tree.name in self._owned or tree.name in self._followed:
                continue
            place = Place(tree, self.config.root_of(tree.rule), self._cache, _limits(tree))
            log.info("action=tree tree=%s owner=%d path=%s", tree.name, tree.owner, place.path)
            if tree.owner == self.cid:
                self._cache.note(tree.name, "owner", str(self.cid))
                owned = self._owned[tree.name] = OwnedTree(place, self.wakeup.wake, broker=self.config.broker_socket)
                owned.start()
            else:
                followed = self._followed[tree.name] = FollowedTree(
                    place,
                    self.wakeup.wake,
                    cid=self.cid,
                    broker=self.config.broker_socket,
                    state_dir=self.config.state_dir,
                    actions=self._runs,
                )
                followed.start()

    def _take_role(self, role: str) -> None:
        """Have the actions run for what this node has become."""
        if self._cache.fact(_ROLE, "taken") != role:
            commands = self._runs.expect(role=role)
            self._cache.note(_ROLE, "taken", role)
            self._runs.request(commands)

    def _watch_tables(self, wanted: bool) -> None:
        wanted = wanted and any(action.tables for action in self._profile.actions)
        if wanted and self._tables is None:
            self._tables = TableActions(self.config.dsn, self._profile, self._cache, self._runs)
        elif not wanted and self._tables is not None:
            self._tables.stop()
            self._tables = None

    def _stop_trees(self, kept: set[Tree]) -> None:
        for threads in (self._owned, self._followed):
            for name, thread in list(threads.items()):
                if thread.tree not in kept:
                    thread.stop()
                    del threads[name]
                    self._published.pop(name, None)

    # -- announcements ------------------------------------------------------------------------------------------------

    def _tell_changes(self, link: BrokerLink) -> None:
        again = time.monotonic() >= self._announce_due
        if again:
            self._announce_due = time.monotonic() + ANNOUNCE_S
        for name, owned in self._owned.items():
            changes = self._collect(name, owned)
            manifest = self._published.get(name)
            if manifest is None or not (again or changes):
                continue
            # What changed together of a configuration is announced together, or not in detail.
            parts = [changes] if owned.tree.is_config or not changes else in_parts(changes)
            for part in parts:
                for each, entry in part:
                    manifest.set(each, entry)
                base = self._told.get(name, manifest.digest)
                self._told[name] = manifest.digest
                news = Announcement(name, manifest.digest, base, tuple(part) or None, owned.lsn)
                link.send({"op": "announce"}, news.pack())

    def _collect(self, name: str, owned: OwnedTree) -> list[Change]:
        """Take what a tree's thread has found since the last time; a whole manifest is what others are told of now."""
        changes: dict[bytes, Entry | None] = {}
        while True:
            try:
                news = owned.news.get_nowait()
            except queue.Empty:
                return list(changes.items())
            if isinstance(news, Manifest):
                self._published[name] = news
                changes.clear()
            else:
                changes.update(news)

    def _hear(self, origin: int, data: bytes) -> None:
        try:
            news = Announcement.unpack(data)
        except ProtocolError as error:
            self._refusals.note(origin, error.message)
            return
        # Who may speak for a tree is this node's to know, not the announcement's to say.
        thread = self._followed.get(news.tree) or self._owned.get(news.tree)
        if thread is None or thread.tree.owner != origin:
            who = f"node {thread.tree.owner} answers for it" if thread is not None else "nobody here has it"
            self._refusals.note(origin, f"it speaks for {news.tree!r:.200}, and {who}", after_s=FOREIGN_S)
        elif isinstance(thread, FollowedTree):
            thread.hear(news)

    # -- calls --------------------------------------------------------------------------------------------------------

    def _call(self, link: BrokerLink, message: Message) -> None:
        request = int(message.get("id", 0))
        method, args = message["method"], message.get("args", {})
        name = args.get("tree") if isinstance(args, Mapping) else None
        if method == "files.accept":
            self._accept(link, request, message, name)
            return
        if method == "files.verify":
            self._verify(message, args)
            return
        if method == "files.repair":
            self._refetch(link, request, args)
            return
        owned = self._owned.get(name) if isinstance(name, str) else None
        if owned is None:
            raise MembershipError(f"node {self.cid} does not answer for the tree {name!r:.100}")
        self._serving.begin(message, answer(method, args, owned.place, self._published.get(owned.tree.name)))

    def _thread(self, name: object) -> OwnedTree | FollowedTree:
        thread = self._owned.get(str(name)) or self._followed.get(str(name))
        if thread is None:
            known = ", ".join(sorted([*self._owned, *self._followed]))
            raise ProtocolError(f"there is no tree {name!r:.100}", hint=f"the trees are {known}")
        return thread

    def _verify(self, message: Message, args: Mapping[str, Any]) -> None:
        share = args.get("share", 100)
        if type(share) is not int or not 1 <= share <= 100:
            raise ProtocolError(f"a tree was to be verified with the share {share!r:.20}")
        pieces = verify_tree(self._thread(args.get("tree")).place, read_names(args.get("names")), share)
        self._serving.begin(message, pieces)

    def _refetch(self, link: BrokerLink, request: int, args: Mapping[str, Any]) -> None:
        thread, names = self._thread(args.get("tree")), read_names(args.get("names"))
        if not isinstance(thread, FollowedTree) or names is None:
            raise ProtocolError("only what another node answers for is fetched again, by name")
        thread.refetch(names)
        log.warning("action=refetch tree=%s names=%d", thread.tree.name, len(names))
        link.send({"op": "done", "id": request, "result": {}})

    def _accept(self, link: BrokerLink, request: int, message: Message, name: object) -> None:
        if message.get("caller") != self.cid:
            raise MembershipError("only this node's own administrator can say that a tree is right")
        self._thread(name).accept()
        log.warning("action=tree-accepted tree=%s", name)
        link.send({"op": "done", "id": request, "result": {}})

    # -- reports ------------------------------------------------------------------------------------------------------

    def _describe(self) -> None:
        threads = [*self._owned.values(), *self._followed.values()]
        self.trees = [thread.status.to_map(thread.tree) for thread in threads]
        self.actions = self._runs.outcomes()
        self.alerts, self.standing_error = [], None
        for thread in threads:
            status, name = thread.status, thread.tree.name
            if status.error and not status.recoverable:
                self.standing_error = PmgsyncError(f"{name}: {status.error}", hint=status.hint)
            if status.error:
                kind = "files" if status.recoverable else "files-stopped"
                self.alerts.append({"kind": kind, "text": f"{name}: {status.error}" + _hint(status.hint)})
            self.alerts += [{"kind": "files", "text": text} for text in status.alerts]
        self.alerts += [{"kind": "action", "text": text} for text in self._runs.alerts()]
        self.alerts += [{"kind": "files", "text": text} for text in self._refusals.alerts()]
        del self.alerts[MAX_ALERTS:]

    def _are_settled(self) -> bool:
        """True when no configuration is known to be behind here."""
        return not any(one.status.behind for one in list(self._followed.values()) if one.tree.is_config)

    def _is_applied(self, origin: int, lsn: int) -> bool:
        """True when a chain is applied here so far, as the broker has heard from apply."""
        client = TreeClient(self.config.broker_socket, stopping=lambda: False)
        try:
            return client.applied(origin) >= lsn
        except PmgsyncError:
            return False
        finally:
            client.close()


def _hint(hint: str) -> str:
    return f" ({hint})" if hint else ""


def _limits(tree: Tree) -> Limits:
    return Limits(tree.rule.max_size, tree.rule.max_files)
