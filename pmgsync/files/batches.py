"""Batches: what is fetched and put in place together."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from pmgsync.core.manifests import Entry, Manifest
from pmgsync.core.renames import Step
from pmgsync.files.contents import Need
from pmgsync.files.scan import LARGE_BYTES

BATCH_NAMES = 2000
BATCH_BYTES = 64 << 20
"""Of a spool; what changed of a configuration is one batch whatever its size."""


@dataclass(slots=True)
class Batch:
    """Steps that are done in one pass once the needs are staged."""

    steps: list[Step]
    needs: list[Need]
    names: list[bytes]

    @property
    def is_large(self) -> bool:
        """True when it is one large file."""
        return len(self.needs) == 1 and is_large(self.needs[0].entry)


def is_large(entry: Entry | None) -> bool:
    """True for a file that is fetched in parts, while others go before it."""
    return entry is not None and entry.size > LARGE_BYTES


def choose_names(pending: dict[bytes, None], postponed: Container[bytes], owner: Manifest) -> list[bytes]:
    """Return the names of a spool's next batch, what was heard of last first.

    A large file is a batch of its own, when nothing else is left: it is fetched in parts, and others go before it.
    """
    names: list[bytes] = []
    large: list[bytes] = []
    size = 0
    for name in reversed(pending):
        if name in postponed:
            continue
        entry = owner.get(name)
        if is_large(entry):
            large.append(name)
            continue
        size += entry.size if entry is not None else 0
        if names and (len(names) >= BATCH_NAMES or size > BATCH_BYTES):
            break
        names.append(name)
    return names or large[:1]
