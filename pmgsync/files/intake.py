"""The receiving side of a tree: what its owner says it holds, what is in place here, and the batches between them.

A spool is compared with what was put in place here, not with the disk: what was purged here stays away, and what the
owner deletes goes. A configuration is compared with the disk: an edit here is put back, and its content is kept. What a
node brings with it when it begins to follow a configuration is no edit by mistake: all of it goes to `replaced/` in the
state directory when it has joined, to `divergence/` when it was the master. Nothing is removed from the spool of a node
that is no member any more.

A set of configuration files is one pass of renames, after all are staged, verified and synced. If one of them cannot be
had any more because it has changed again, none is placed. What is in the way goes first, then directories, then files,
then what is gone. A pass that a crash cut off is finished when the tree is opened (`passes`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pmgsync.core.filenames import Selection, parents
from pmgsync.core.manifests import Change, Entry, Manifest
from pmgsync.core.renames import check_shape, plan_pass
from pmgsync.core.trees import Tree, looks_vanished
from pmgsync.errors import ProtocolError
from pmgsync.files.attributes import localised
from pmgsync.files.batches import Batch, UnderWay, choose_names, is_large
from pmgsync.files.cache import Cache, Row
from pmgsync.files.contents import Contents, Need
from pmgsync.files.directories import FilesError, TreeStoppedError
from pmgsync.files.local import LocalTree
from pmgsync.files.marker import ACCEPT_HINT, check_marker, open_root, write_marker
from pmgsync.files.passes import drop_record, finish_pass, record_pass
from pmgsync.files.placing import FEW, Placer
from pmgsync.files.reading import find_standing
from pmgsync.files.scan import Limits
from pmgsync.files.space import check_room, sync_file_system
from pmgsync.files.staging import Staging

DIVERGED, REPLACED, STAMP = "divergence", "replaced", "files-%Y%m%dT%H%M%S"
NOTED_ROWS = 10_000
"""So much of a spool is put in place before its names are brought to the disk and noted: once, not for each batch."""


NAME_BYTES = 200
"""The bytes of name, user and group that each of the entries that a tree may have is reckoned with."""
Entries = Mapping[bytes, Entry]


# Over 250 lines: one tree's state (offered, staged, put in place), of which every step reads and changes a part.
class Intake:
    """One tree that another node owns; used by one thread.

    Attributes:
        owner: what the owner says it holds, as it says it.
        held: what is in place here of that.
        known: `owner` is complete: it was compared with the owner since this was made.
        contents: what is being fetched.
        under_way: the batch that is staged, and not in place.
        kept: paths of copies of what was written here against the owner.
        errors: by name, why it is not in place.
        postponed: names that are left out of the next batches.
    """

    def __init__(self, tree: Tree, path: Path, cache: Cache, limits: Limits, cid: int, state_dir: Path) -> None:
        """Open the tree's directory, and make it when this node never had it.

        Args:
            cid: of this node.
            state_dir: for what this node has in a configuration that it begins to take from another node.

        Raises:
            TreeStoppedError: when its marker is gone.
            FilesError: when it cannot be used.
        """
        self.tree = tree
        self.known = False
        self.errors: dict[bytes, FilesError] = {}
        self.kept: list[str] = []
        self._cache = cache
        self._cid = cid
        self._limits = limits
        self._selection = Selection(tree.rule.include, tree.rule.exclude)
        self.local = LocalTree(tree, path, cache, limits) if tree.is_config else None
        self.root = self.local.root if self.local is not None else open_root(tree, path, cache, create=True)
        try:
            check_marker(self.root, cache, tree.name)
            before = cache.fact(tree.name, "owner")
            # What a node brings with it, or wrote as the master, is not an edit by mistake: it goes to one place.
            self._new_here = tree.is_config and before in {"", str(cid)}
            folder = state_dir / (DIVERGED if before else REPLACED) / time.strftime(STAMP, time.localtime())
            keep_in = folder / tree.name.strip("/") if self._new_here else None
            if tree.is_config:
                self.kept += finish_pass(self.root, cache, tree.name, keep_in)
            self._staging = Staging(self.root)
        except (FilesError, TreeStoppedError):
            self._close_root()
            raise
        self._placer = Placer(self.root, self._staging, keep_in)
        # What it took from an earlier master says nothing about what it wrote as the master.
        self.held = Manifest() if self._new_here else cache.held(tree.name)
        self.owner = self.held.copy()
        self.contents = Contents(self.root, self._staging)
        self.contents.learn(self.held.items())
        self.under_way = UnderWay()
        # What was heard of last comes first: a new mail is not behind all those of a first sync. What one comparison
        # finds comes in the order in which it was made, which is that of the rows that wait for it.
        self._pending: dict[bytes, None] = {}
        self._found: set[bytes] = set()
        self._unnoted: list[Row] = []
        self._remaining_at = (b"", 0)
        self.postponed: set[bytes] = set()
        self._accepted = False

    def close(self) -> None:
        """Close all descriptors."""
        self.contents.let_go()
        self.under_way.close()
        with contextlib.suppress(FilesError):  # what is not noted is compared again
            self.flush()
        self._staging.close()
        self._close_root()

    def _close_root(self) -> None:
        if self.local is not None:
            self.local.close()
        self.root.close()

    # -- what the owner says ------------------------------------------------------------------------------------------

    def offer(self, changes: Iterable[Change]) -> None:
        """Take changes that the owner announced.

        Raises:
            ProtocolError: when they cannot be a tree's, or are more than it may hold.
        """
        changes = list(changes)
        for name, entry in changes:
            # What this node's profile does not select is known, for sums are compared, and not put in place.
            if self.owner.set(name, entry) and self._selection.selects(name):
                self._pending.pop(name, None)
                if entry is not None or not self.tree.gone:
                    self._pending[name] = None
        self.under_way.told(name for name, _ in changes)
        most = self._limits.max_count
        if len(self.owner) > most or self.owner.text_bytes > most * NAME_BYTES:
            raise ProtocolError(
                f"node {self.tree.owner} has more than {most} entries in {self.tree.name}, or their names are too long"
            )
        check_shape(self.owner, changes)

    def compare(self, buckets: Iterable[int], entries: Mapping[bytes, Entry]) -> None:
        """Take all entries that the owner has in some groups.

        Raises:
            ProtocolError: as `offer`.
        """
        changes = list(self.owner.with_buckets(buckets, entries))
        self.offer(changes)
        self._found.update(name for name, _ in changes)

    def compared(self) -> None:
        """Note that `owner` is complete now: what differs from it is to be brought in line."""
        if not self.known:
            selects = self._selection.selects
            different = (name for name, entry in self.owner.items() if self.held.get(name) != entry)
            self._pending |= dict.fromkeys(name for name in different if selects(name))
            if not self.tree.gone:
                self._pending |= dict.fromkeys(name for name in self.held if name not in self.owner)
            self._found.update(self._pending)
        self.known = True
        for name in sorted(self._found.intersection(self._pending), key=self._made, reverse=True):
            del self._pending[name]
            self._pending[name] = None
        self._found.clear()

    def _made(self, name: bytes) -> int:
        entry = self.owner.get(name)
        return entry.mtime_ns if entry is not None else 0

    def refetch(self, names: Iterable[bytes]) -> None:
        """Forget that names are in place: they are compared with the disk and fetched again when they differ."""
        for name in names:
            self.held.set(name, None)
            self._unnoted.append((name, None, None))
            self._pending[name] = None
        self.flush()

    def accept(self) -> None:
        """Go on as things are now, on an administrator's word.

        Raises:
            FilesError: when the marker cannot be made.
        """
        write_marker(self.root, self._cache, self.tree.name)
        if self.local is not None:
            self.local.accept()
        self._accepted = True

    @property
    def behind(self) -> int:
        """How many names are not in place."""
        return len(self._pending)

    # -- batches ------------------------------------------------------------------------------------------------------

    def batch(self) -> Batch | None:
        """Return what to do next, None when all is in place.

        Raises:
            TreeStoppedError: when the owner's tree, or this one, looks as if its disk were gone.
            FilesError: when there is no room, or the tree cannot be read.
        """
        if not self.known:
            return None
        check_marker(self.root, self._cache, self.tree.name)
        vanished = looks_vanished(self.held.files, self.owner.files, config=self.tree.is_config)
        if vanished and not self._accepted and not self.tree.gone:
            raise TreeStoppedError(
                f"node {self.tree.owner} has none of the {self.held.files} files of {self.tree.name} any more; "
                "nothing is removed here",
                hint=ACCEPT_HINT.format(name=self.tree.name),
            )
        wanted, actual, names = self._configuration() if self.local is not None else self._spool()
        if not names:
            if self.under_way.batch is None:
                self.flush()
            if not self._pending and not self.postponed:
                self._settled()
            return None
        steps = plan_pass(wanted, actual, self._as_here(self.held, names), names)
        needs = {
            step.entry.digest: Need(step.name, step.entry)
            for step in steps
            if step.what == "put" and step.entry is not None and step.entry.digest not in self._staging.whole
        }
        check_room(self.root, sum(need.entry.size - self._begun(need) for need in needs.values()))
        return Batch(steps, list(needs.values()), {name: self.owner.get(name) for name in names})

    def _begun(self, need: Need) -> int:
        """Return how much of a content is here; small ones come whole."""
        return min(need.entry.size, self._staging.begun(need.digest)) if is_large(need.entry) else 0

    def _configuration(self) -> tuple[Entries, Entries, list[bytes]]:
        assert self.local is not None
        self.local.changes()
        actual = self.local.found.manifest
        if self._remaining_at != (actual.digest, self.local.scans):
            # What was in their way may be gone.
            self._placer.remaining.clear()
        wanted = self._as_here(self.owner, filter(self._selection.selects, self.owner))
        names = [name for name, entry in wanted.items() if actual.get(name) != entry]
        names += [name for name in actual if name not in wanted and name not in self._placer.remaining]
        if not names and self._pending:
            self._note({name: self.owner.get(name) for name in self._pending})
        names = [name for name in names if name not in self.postponed]
        return wanted, actual.entries, names

    def _spool(self) -> tuple[Entries, Entries, list[bytes]]:
        names = choose_names(self._pending, self.postponed, self.owner, self.held, self.under_way)
        # A file needs the directories above it, with their modes, in the same batch or before.
        directories = {name.rpartition(b"/")[0] for name in names}
        outers = {outer for one in directories for outer in (*parents(one), one) if outer in self._pending}
        above = {outer for outer in outers if self._is_made(outer) and not self.under_way.has(outer, None)}
        names = sorted(above.union(names))
        actual = dict(self._as_here(self.held, names))
        wanted = self._as_here(self.owner, names)
        unknown = [(name, entry) for name, entry in wanted.items() if name not in actual]
        actual.update(find_standing(self.root, unknown))
        return wanted, actual, names

    def _is_made(self, outer: bytes) -> bool:
        entry = self.owner.get(outer)
        return entry is not None and entry.kind == "d"

    @property
    def others_wait(self) -> bool:
        """True when a batch of a large file is to be left for one of others."""
        waiting = (name for name in reversed(self._pending) if name not in self.postponed)
        return any(not is_large(self.owner.get(name)) for name in waiting)

    def _as_here(self, manifest: Manifest, names: Iterable[bytes]) -> Entries:
        trusted, entries = self.tree.is_config, manifest.entries
        return {name: localised(entries[name], trusted=trusted) for name in names if name in entries}

    def without(self, batch: Batch, digests: set[bytes]) -> Batch:
        """Return what is left of a batch when some contents cannot be had now; their names are postponed."""
        lost = {step.name for step in batch.steps if step.entry is not None and step.entry.digest in digests}
        self.postponed |= lost
        if self.tree.is_config:
            # A set that changed together becomes visible together, or not at all.
            return Batch([], [], {})
        return Batch(
            [step for step in batch.steps if step.name not in lost],
            [need for need in batch.needs if need.digest not in digests],
            {name: entry for name, entry in batch.entries.items() if name not in lost},
        )

    def may_wait(self, batch: Batch) -> bool:
        """True when a batch may be under way while the next is fetched; False when it is to be done by itself."""
        return self.local is None and len(batch.needs) > FEW and batch.adds_only

    def begin(self, batch: Batch) -> None:
        """Begin to bring what is staged for a batch to the disk; `place_begun` goes on."""
        self.under_way.begin(batch, lambda: sync_file_system(self.root.fd))

    def place_begun(self) -> list[bytes]:
        """Do the batch that is under way, if there is one; return the names whose content changed here.

        Raises:
            FilesError: when the disk refuses to keep it.
        """
        try:
            batch = self.under_way.take()
        except OSError as error:
            self.contents.let_go()
            raise self._placer.not_synced(error) from error
        if batch is None:
            return []
        self._placer.synced()
        return self._place(batch)

    def place(self, batch: Batch) -> list[bytes]:
        """Do a batch whose needs are staged; return the names whose content changed here.

        Raises:
            FilesError: when the disk refuses to keep it.
        """
        self._placer.sync_contents(batch.steps)
        return self._place(batch)

    def _place(self, batch: Batch) -> list[bytes]:
        if self.tree.is_config and len(batch.steps) > 1:
            record_pass(self.root, batch.steps, self.owner.entries)
        done = set(self._placer.run(batch.steps))
        self.errors = dict(self._placer.errors)
        self.kept += self._placer.kept
        self._placer.kept.clear()
        if self.local is not None:
            self.local.look(list(batch.entries))
            self._remaining_at = (self.local.found.manifest.digest, self.local.scans)
            self._find_refused(batch)
        # A name without a step was as wanted already.
        failed = set(self.errors)
        self.postponed |= failed
        self._note({name: entry for name, entry in batch.entries.items() if name not in failed})
        if self.tree.is_config or len(self._unnoted) > NOTED_ROWS:
            self.flush()
        if self.tree.is_config:
            drop_record(self.root)
        return [step.name for step in batch.steps if step.name in done and step.what in {"put", "remove"}]

    def _find_refused(self, batch: Batch) -> None:
        """Note what is not as it was placed: a disk that does not keep such times or owners, or an edit just now.

        Without that, it would be placed again and again without a pause.
        """
        assert self.local is not None
        for step in batch.steps:
            here = self.local.found.manifest.get(step.name)
            if step.entry is not None and here != step.entry and step.name not in self.errors:
                self.errors[step.name] = FilesError(
                    f"{self.root.show(step.name)} is not as node {self.tree.owner} has it after it was placed",
                    hint="another program writes it, or its file system does not keep such a mode, owner or time",
                )

    def _note(self, entries: Mapping[bytes, Entry | None]) -> None:
        for name, entry in entries.items():
            self._unnoted.append((name, entry, None))
            self.held.set(name, entry)
            if self.owner.get(name) == entry:
                self._pending.pop(name, None)
        self.contents.learn((name, entry) for name, entry in entries.items() if entry is not None)

    def flush(self) -> None:
        """Bring all names to the disk, and note them as in place only then.

        Raises:
            FilesError: when the disk refuses it.
        """
        if self._unnoted:
            self._placer.sync()
            self._cache.write(self.tree.name, "held", self._unnoted)
            self._unnoted.clear()

    def _settled(self) -> None:
        """Everything is as the owner has it."""
        self._accepted = False
        self.contents.let_go()
        self._staging.keep_only(set())
        if self.contents.known > 2 * len(self.held) + 1000:
            self.contents.learn(self.held.items(), anew=True)
        if self._cache.fact(self.tree.name, "owner") != str(self.tree.owner):
            self._cache.note(self.tree.name, "owner", str(self.tree.owner))
        if self._new_here:
            self._new_here = False
            self._placer = Placer(self.root, self._staging)
