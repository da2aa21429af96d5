"""Failures: the server's errors as errors of ours, and which of them pass by themselves."""

from __future__ import annotations

import psycopg2

from pmgsync.core.positions import format_lsn
from pmgsync.errors import ApplyError, TransientApplyError

_TRANSIENT_CLASSES = ("08", "40", "53", "57")
"""Connection, transaction rollback (deadlock), insufficient resources, operator intervention (shutdown, cancel)."""
_TRANSIENT_STATES = {"55006", "55P03"}
"""Object in use, lock not available."""
_TYPE_STATES = {"42804", "42846", "428C9", "42883"}
"""Datatype mismatch, cannot coerce, generated always, undefined function."""
_DATABASE_DROPPED = "57P04"
_MESSAGE_CHARACTERS = 400


def apply_error(error: psycopg2.Error, *, origin: int, table: str, lsn: int) -> ApplyError:
    """Return our error for one of the server's; a TransientApplyError when repeating may help.

    Args:
        origin: the chain's.
        table: schema-qualified, "" to take what the server says.
        lsn: commit LSN of the transaction, 0 when it was none.
    """
    state = error.pgcode or ""
    # An error without SQLSTATE does not come from the server: the connection is lost.
    lost = not state and isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
    passes = state.startswith(_TRANSIENT_CLASSES) and state != _DATABASE_DROPPED
    transient = lost or passes or state in _TRANSIENT_STATES
    if not table and error.diag.table_name:
        table = f"{error.diag.schema_name}.{error.diag.table_name}"
    at = format_lsn(lsn) if lsn else ""
    where = (f" in {table}" if table else "") + (f" at {at}" if at else "")
    kind = TransientApplyError if transient else ApplyError
    return kind(
        f"the chain of node {origin} cannot be applied{where}: {one_line(error)}",
        table=table,
        lsn=at,
        sqlstate=state,
        hint="" if transient else _hint(state, table),
    )


def is_drift(error: psycopg2.Error, *, differs: bool) -> bool:
    """Return True when a row was refused because its table differs from the origin's: the origin has accepted the row.

    A constraint that stands against it (unique, foreign key, check) is no drift: the rows differ then, not the tables.

    Args:
        differs: a column of the table may have another type here.
    """
    state = error.pgcode or ""
    if state == "23502":
        return True
    return differs and (state.startswith("22") or state in _TYPE_STATES)


def one_line(error: Exception) -> str:
    """Return what an error says without the statement that it quotes, which may hold the rows of others."""
    lines = str(error).strip().splitlines()
    text = " ".join(line.strip() for line in lines if not line.startswith(("CONTEXT:", "LINE ")))
    return text[:_MESSAGE_CHARACTERS] or type(error).__name__


def _hint(state: str, table: str) -> str:
    match state[:2]:
        case "23":
            return f"a row written on this node stands against it: remove it from {table}, and applying goes on"
        case "42":
            return "bring the table into agreement with the origin's, and see that pmgsync's own schema is up to date"
        case "22":
            return f"see whether the columns of {table} have the same types as on the origin"
        case _:
            return "put right what the server complains about; it is tried again until then"
