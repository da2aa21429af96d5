"""Batches: what is fetched and put in place together.

Contents must be on the disk before a name leads to them, and that takes as long as fetching them. So the contents of
one batch are brought to the disk while the next is fetched. That is for what only adds to a spool: there the next
batch's plan does not depend on whether the one before is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pmgsync.core.manifests import Entry, Manifest
from pmgsync.core.renames import Step
from pmgsync.files.contents import Need
from pmgsync.files.scan import LARGE_BYTES

BATCH_NAMES = 1000
BATCH_BYTES = 32 << 20
"""Of a spool; what changed of a configuration is one batch whatever its size."""


@dataclass(slots=True)
class Batch:
    """Steps that are done in one pass once the needs are staged.

    Attributes:
        entries: by name, what the owner said of it when the steps were planned.
    """

    steps: list[Step]
    needs: list[Need]
    entries: dict[bytes, Entry | None]

    @property
    def adds_only(self) -> bool:
        """True when its steps are the same whether a batch before is in place or not."""
        return all(step.what in {"put", "directory"} and not step.keep for step in self.steps)

    @property
    def is_large(self) -> bool:
        """True when it is one large file."""
        return len(self.needs) == 1 and is_large(self.needs[0].entry)


def is_large(entry: Entry | None) -> bool:
    """True for a file that is fetched in parts, while others go before it."""
    return entry is not None and entry.size > LARGE_BYTES


class UnderWay:
    """The batch whose contents are on their way to the disk.

    Attributes:
        batch: None when there is none.
        overtaken: the owner has said something else of one of its names since.
    """

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.overtaken = False
        self._digests: frozenset[bytes] = frozenset()
        self._synced: Future[None] | None = None
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")

    def begin(self, batch: Batch, sync: Callable[[], None]) -> None:
        """Have `sync` called in another thread."""
        self.batch, self.overtaken = batch, False
        self._digests = frozenset(need.digest for need in batch.needs)
        self._synced = self._threads.submit(sync)

    def has(self, name: bytes, entry: Entry | None) -> bool:
        """True when a name, or the content of its entry, is on its way."""
        if self.batch is None:
            return False
        return name in self.batch.entries or (entry is not None and entry.digest in self._digests)

    def told(self, names: Iterable[bytes]) -> None:
        """Note names of which the owner has said something."""
        if self.batch is not None and not self.overtaken:
            self.overtaken = any(name in self.batch.entries for name in names)

    @property
    def is_synced(self) -> bool:
        """True when there is a batch, and waiting for it takes no time."""
        return self._synced is not None and self._synced.done()

    def take(self) -> Batch | None:
        """Return the batch once its contents are on the disk, None when there is none.

        Raises:
            OSError: when the disk refuses them; the batch is forgotten.
        """
        batch, synced = self.batch, self._synced
        self.batch = self._synced = None
        if synced is not None:
            synced.result()
        return batch

    def close(self) -> None:
        """Wait for the thread to end."""
        self._threads.shutdown()


def choose_names(
    pending: dict[bytes, None], postponed: Collection[bytes], owner: Manifest, held: Manifest, under_way: UnderWay
) -> list[bytes]:
    """Return the names of a spool's next batch, what was heard of last first.

    A large file is a batch of its own, when nothing else is left: it is fetched in parts, and others go before it. Then
    come directories that go, or make room for a file: all that was in them must have gone before.
    """
    names: list[bytes] = []
    large: list[bytes] = []
    emptied: list[bytes] = []
    size = 0
    told, here = owner.entries, held.entries
    for name in reversed(pending):
        if name in postponed:
            continue
        entry = told.get(name)
        if under_way.has(name, entry):
            continue
        entry_size = 0 if entry is None else entry.size
        if entry_size > LARGE_BYTES:
            large.append(name)
            continue
        before = here.get(name)
        if before is not None and before.kind == "d" and (entry is None or entry.kind != "d"):
            emptied.append(name)
            continue
        size += entry_size
        if names and (len(names) >= BATCH_NAMES or size > BATCH_BYTES):
            break
        names.append(name)
    return names or large[:1] or ([] if postponed or under_way.batch is not None else emptied)
