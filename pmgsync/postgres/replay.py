"""Replay: makes diverged changes again on the master as ordinary writes, row by row, and overwrites nothing unasked.

A change is made when the row is as the change found it. Of a table whose replica identity is its key the change does
not say how it found the row; then it is made only when an earlier change of the same replay has written that row.
Everything else is a conflict, which is listed, and made only when that is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import psycopg2
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.divergence import Diverged, Values
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.session import connect, quote_ident, quote_literal, rows

Outcome = Literal["done", "there", "conflict", "forced"]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of a change.

    Attributes:
        outcome: `done`; `there`: the row is like that already; `conflict`: not done; `forced`: done all the same.
        reason: why it is a conflict, or was one; "" when it is none.
        now: the row as it was found, None when it was not there or does not matter.
    """

    change: Diverged
    outcome: Outcome
    reason: str = ""
    now: Values | None = None


def replay(dsn: str, changes: Iterable[Diverged], *, force: bool) -> Iterator[Replayed]:
    """Make changes again, each in a transaction of its own.

    Args:
        force: also those that are in conflict, as far as they can be made.

    Raises:
        UnreachableError: when the server does not answer.
        PmgsyncError: when it refuses every write, because this node is not the master or is closed.
    """
    try:
        with contextlib.closing(connect(dsn, application_name="pmgcm divergence")) as connection:
            connection.autocommit = True
            written: set[tuple[bytes, bytes, frozenset[tuple[bytes, bytes | None]]]] = set()
            with connection.cursor() as cursor:
                for change in changes:
                    done = _Change(cursor, change, (*_place(change), _frozen(change.key)) in written).make(force)
                    if done.outcome in {"done", "forced"} and change.key:
                        written.add((*_place(change), _frozen(change.key)))
                        if change.new is not None:
                            moved = {name: change.new.get(name, value) for name, value in change.key.items()}
                            written.add((*_place(change), _frozen(moved)))
                    yield done
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise UnreachableError(f"the database did not answer ({str(error).strip()})") from error
    except psycopg2.Error as error:
        raise PmgsyncError(str(error).strip().split("\n", 1)[0]) from error


def _place(change: Diverged) -> tuple[bytes, bytes]:
    return change.schema, change.table


def _frozen(values: Values) -> frozenset[tuple[bytes, bytes | None]]:
    return frozenset(values.items())


class _ConflictError(Exception):
    """A change cannot be made without overwriting something."""

    def __init__(self, reason: str, now: Values | None = None) -> None:
        super().__init__(reason)
        self.now = now


class _Change:
    """One change on one session."""

    def __init__(self, cursor: Cursor, change: Diverged, mine: bool) -> None:
        self._cursor = cursor
        self._change = change
        self._mine = mine
        self._table = b"%s.%s" % (quote_ident(change.schema), quote_ident(change.table))

    def make(self, force: bool) -> Replayed:
        """Make it, or say why not."""
        change = self._change
        if change.kind == "schema":
            return Replayed(change, "conflict", "a change of the schema is to be made by hand")
        try:
            return Replayed(change, "done" if self._in_transaction(force=False) else "there")
        except _ConflictError as conflict:
            reason, now = str(conflict), conflict.now
        if not force:
            return Replayed(change, "conflict", reason, now)
        try:
            self._in_transaction(force=True)
        except _ConflictError as conflict:
            return Replayed(change, "conflict", f"{reason}; {conflict}", now)
        return Replayed(change, "forced", reason, now)

    def _in_transaction(self, *, force: bool) -> bool:
        """Return True when something was changed, False when it is there already."""
        self._cursor.execute(b"BEGIN")
        try:
            done = self._do(force)
            self._cursor.execute(b"COMMIT")
        except psycopg2.errors.ReadOnlySqlTransaction:
            raise  # the guard: this node is not the master, or not now
        except (psycopg2.IntegrityError, psycopg2.ProgrammingError, psycopg2.DataError) as error:
            self._cursor.execute(b"ROLLBACK")
            raise _ConflictError(str(error).strip().split("\n", 1)[0]) from error
        except _ConflictError:
            self._cursor.execute(b"ROLLBACK")
            raise
        return done

    def _do(self, force: bool) -> bool:
        change = self._change
        match change.kind:
            case "insert":
                return self._insert(change.new or {}, force)
            case "update":
                return self._update(change.new or {}, force)
            case "delete":
                return self._delete(force)
            case _:
                if not force:
                    raise _ConflictError("the whole table was emptied")
                self._cursor.execute(b"TRUNCATE %s" % self._table)
                return True

    def _insert(self, new: Values, force: bool) -> bool:
        found = self._find(self._change.key or new, new)
        if found is None:
            self._write_new(new)
            return True
        place, now = found
        if _same(now, new):
            return False
        if not (force or self._mine):
            raise _ConflictError("another row has its key", now)
        self._write(place, now, new)
        return True

    def _update(self, new: Values, force: bool) -> bool:
        change = self._change
        found = self._find(change.key or change.old or {}, {**(change.old or {}), **new})
        if found is None:
            if change.key and self._find({name: new.get(name) for name in change.key}, new) is not None:
                return False
            if not force:
                raise _ConflictError("the row is not there any more")
            self._write_new(new)
            return True
        place, now = found
        if _same(now, new):
            return False
        self._check(now, force)
        self._write(place, now, new)
        return True

    def _delete(self, force: bool) -> bool:
        change = self._change
        old = change.old or {}
        found = self._find(change.key or old, old)
        if found is None:
            return False
        place, now = found
        self._check(now, force)
        self._cursor.execute(b"DELETE FROM %s WHERE ctid = '%s'" % (self._table, place))
        return True

    def _check(self, now: Values, force: bool) -> None:
        """Raise when the row may be another than the change has found."""
        change = self._change
        old = {name: value for name, value in (change.old or {}).items() if name not in change.key}
        if force or self._mine:
            return
        if not old and change.key:
            raise _ConflictError("what the row was before is not known", now)
        if not _same(now, old):
            raise _ConflictError("the row is another than it was", now)

    def _find(self, key: Values, columns: Mapping[bytes, object]) -> tuple[bytes, Values] | None:
        """Return a row's place and values, locked; None when there is none."""
        by_key = bool(self._change.key)
        conditions = [
            b"%s IS NULL" % quote_ident(name) if value is None
            else b"%s = %s" % (quote_ident(name), quote_literal(value)) if by_key
            else b"%s = %s" % (_text(name), quote_literal(value))
            for name, value in key.items()
        ]  # fmt: skip
        names = list(columns)
        listed = b", ".join([b"ctid::text", *map(_text, names)])
        self._cursor.execute(
            b"SELECT %s FROM %s WHERE %s LIMIT 1 FOR UPDATE"
            % (listed, self._table, b" AND ".join(conditions) or b"false")
        )
        found = rows(self._cursor)
        if not found:
            return None
        place, *values = found[0]
        assert place is not None
        return place, dict(zip(names, values, strict=True))

    def _write_new(self, new: Values) -> None:
        names = b", ".join(map(quote_ident, new))
        values = b", ".join(map(quote_literal, new.values()))
        self._cursor.execute(b"INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE VALUES (%s)" % (self._table, names, values))

    def _write(self, place: bytes, now: Values, new: Values) -> None:
        # Only what differs: an identity that is always generated takes no value, not even its own.
        changed = {name: value for name, value in new.items() if now.get(name) != value}
        settings = b", ".join(b"%s = %s" % (quote_ident(name), quote_literal(value)) for name, value in changed.items())
        self._cursor.execute(b"UPDATE %s SET %s WHERE ctid = '%s'" % (self._table, settings, place))


def _text(name: bytes) -> bytes:
    # As the output function writes it, which is how the changes have it; a cast differs for boolean and others.
    column = quote_ident(name)
    return b"CASE WHEN %s IS NULL THEN NULL ELSE pg_catalog.format('%%s', %s) END" % (column, column)


def _same(now: Values, wanted: Values) -> bool:
    return all(now.get(name) == value for name, value in wanted.items())
