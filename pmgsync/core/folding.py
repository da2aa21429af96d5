"""Folding: many changes of one table, in order, into few sets that can each be done by one statement. Pure, no I/O.

Invariant: whenever executing a phase succeeds, executing its changes one by one would have succeeded too and left the
same rows. A phase is executed in this order: a check that rows which must be absent are, then deletes, updates,
inserts. Each must hit exactly the rows that it names. A change that does not fit begins a new phase; if it is an error,
it shows there.

The changes of one row are folded into one where no constraint but the key could have seen the values in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pmgsync.core.changes import read_delete, read_row, read_update
from pmgsync.core.pgoutput import UNCHANGED, Row


class Phase:
    """Changes of one table that can be executed as sets, each key in at most one of them, or deleted and inserted.

    Attributes:
        absent: keys of rows that were inserted and deleted again: none of them may be there before.
        deleted: the old values of rows that are deleted, by key. Of some it is the message that says so, not read yet.
        updated: the new values of rows that are updated, by key; `UNCHANGED` for those that keep theirs. Of some it is
            the message that says so, not read yet.
        inserted: the rows that are inserted; None for one that is gone again.
        messages: instead of `inserted`, as long as nothing but inserts came, which need not be read one by one.
        count: how many changes it holds.
    """

    __slots__ = (
        "_folds",
        "_key",
        "_key_of",
        "_places",
        "absent",
        "count",
        "deleted",
        "inserted",
        "messages",
        "updated",
    )

    def __init__(
        self, key: Callable[[Row], Any] | None, key_of: Callable[[bytes], Any] | None = None, *, folds: bool
    ) -> None:
        """Begin an empty phase.

        Args:
            key: picks the key from a row; None: the table has none that rows could be found by, only inserts fit.
            key_of: picks the key from the message of an update that kept it.
            folds: several changes of one row may become one.
        """
        self._key = key
        self._key_of = key_of
        self._folds = folds
        self._places: dict[Any, int] | None = None
        self.absent: dict[Any, None] = {}
        self.deleted: dict[Any, Row | bytes] = {}
        self.updated: dict[Any, Row | bytes] = {}
        self.inserted: list[Row | None] = []
        self.messages: list[bytes] = []
        self.count = 0

    def copy(self, messages: list[bytes]) -> bool:
        """Add inserts as messages; False when that is not possible, and each is to be added by `insert`."""
        if self._places is not None or self.inserted:
            return False
        self.messages += messages
        self.count += len(messages)
        return True

    def _read(self) -> None:
        """Have all inserts as rows."""
        if self.messages:
            self.inserted += map(read_row, self.messages)
            self.messages.clear()

    def insert(self, new: Row) -> bool:
        """Add an insert; False when it does not fit into this phase."""
        self._read()
        if self._places is None:
            # Only inserts so far: nothing need be compared, because the key itself refuses a second row.
            self.inserted.append(new)
            self.count += 1
            return True
        assert self._key is not None
        key = self._key(new)
        if key in self._places or key in self.updated or (not self._folds and self._touched(key)):
            return False
        self.absent.pop(key, None)
        self._places[key] = len(self.inserted)
        self.inserted.append(new)
        self.count += 1
        return True

    def update(self, new: Row) -> bool:
        """Add an update that does not change the key; False when it does not fit."""
        places = self._inserted_places()
        if places is None or self._key is None:
            return False
        key = self._key(new)
        if not self._touched(key):
            self.updated[key] = new
        elif not self._folds:
            return False
        elif (place := places.get(key)) is not None:
            self.inserted[place] = _over(new, self.inserted[place])
        elif (before := self.updated.get(key)) is not None:
            self.updated[key] = _over(new, read_update(before).new if isinstance(before, bytes) else before)
        else:
            return False
        self.count += 1
        return True

    def update_unread(self, messages: Sequence[bytes]) -> int:
        """Add updates that kept their keys, as the messages that say so; returns how many fit, of the first ones.

        Raises:
            ProtocolError: when one is malformed, as far as it is read.
        """
        if self._inserted_places() is None or self._key_of is None:
            return 0
        keys = list(map(self._key_of, messages))
        added = dict(zip(keys, messages, strict=True))
        if len(added) == len(messages) and self._untouched(added, self.updated):
            self.updated |= added
        elif self._folds and self._untouched(added) and b"u" not in b"".join(messages):
            # The same mark as of an unchanged value, if it has one at all; then it takes nothing from what was before.
            self.updated |= added
        else:
            for taken, (key, message) in enumerate(zip(keys, messages, strict=True)):
                if not self._touched(key) or (self._folds and key in self.updated and b"u" not in message):
                    self.updated[key] = message
                    self.count += 1
                elif not self._folds or not self.update(read_update(message).new):
                    return taken
            return len(messages)
        self.count += len(messages)
        return len(messages)

    def delete(self, old: Row) -> bool:
        """Add a delete; False when it does not fit."""
        if self._inserted_places() is None or self._key is None:
            return False
        return self._delete(self._key(old), old)

    def delete_unread(self, messages: Sequence[bytes]) -> int:
        """Add deletes by key, as the messages that say so; returns how many fit, of the first ones.

        Raises:
            ProtocolError: when one is malformed, as far as it is read.
        """
        if self._inserted_places() is None or self._key_of is None:
            return 0
        keys = list(map(self._key_of, messages))
        added = dict(zip(keys, messages, strict=True))
        if len(added) == len(messages) and self._untouched(added, self.updated):
            self.deleted |= added
            self.count += len(messages)
            return len(messages)
        for taken, (key, message) in enumerate(zip(keys, messages, strict=True)):
            if not self._delete(key, message):
                return taken
        return len(messages)

    def _delete(self, key: Any, old: Row | bytes) -> bool:
        assert self._places is not None
        if not self._touched(key):
            self.deleted[key] = old
        elif not self._folds:
            return False
        elif (place := self._places.pop(key, None)) is not None:
            self.inserted[place] = None
            if key not in self.deleted:
                self.absent[key] = None
        elif self.updated.pop(key, None) is not None:
            self.deleted[key] = old
        else:
            return False
        self.count += 1
        return True

    def deleted_rows(self) -> list[Row]:
        """Return the old values of the rows that are deleted.

        Raises:
            ProtocolError: when a message is malformed.
        """
        return [read_delete(old) if isinstance(old, bytes) else old for old in self.deleted.values()]

    def _untouched(self, keys: dict[Any, Any], *others: dict[Any, Any]) -> bool:
        """Return True when none of the keys is inserted, deleted or gone, or in the other dictionaries."""
        assert self._places is not None
        all_known: list[dict[Any, Any]] = [self._places, self.deleted, self.absent, *others]
        return all(keys.keys().isdisjoint(known.keys()) for known in all_known)

    def _touched(self, key: Any) -> bool:
        assert self._places is not None
        return key in self._places or key in self.updated or key in self.deleted or key in self.absent

    def _inserted_places(self) -> dict[Any, int] | None:
        """Return where each inserted row is, by key; None when two have one key: then the server has to decide."""
        if self._places is None and self._key is not None:
            self._read()
            places = {self._key(new): at for at, new in enumerate(self.inserted) if new is not None}
            if len(places) != len(self.inserted):
                return None
            self._places = places
        return self._places


def _over(new: Row, before: Row | None) -> Row:
    """Return a row's values after an update of what it was."""
    if before is None or UNCHANGED not in new:
        return new
    return tuple(was if value is UNCHANGED else value for value, was in zip(new, before, strict=True))
