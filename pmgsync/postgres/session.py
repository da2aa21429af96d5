"""Sessions on the local database: pinned formats, raw bytes in and out, and quoting."""

from __future__ import annotations

from types import MappingProxyType

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import connection as Connection  # noqa: N812

from pmgsync.errors import UnreachableError

PINNED = MappingProxyType(
    {
        # Text formats: capture, snapshot and apply must write and read a value the same way. Values have no spaces,
        # so that they fit into libpq's `options`.
        "datestyle": "ISO,MDY",
        "intervalstyle": "postgres",
        "extra_float_digits": "3",
        "bytea_output": "hex",
        "timezone": "UTC",
        "lc_monetary": "C",
        "xmloption": "content",
        "standard_conforming_strings": "on",
        "backslash_quote": "safe_encoding",
        "array_nulls": "on",
        "transform_null_equals": "off",
        "quote_all_identifiers": "off",
        # No conversion, ever: on an SQL_ASCII database any other value can jam the slot for good.
        "client_encoding": "SQL_ASCII",
        # Names of other schemas (regclass, types) are written in full.
        "search_path": "pg_catalog",
        # A role's or database's defaults must not end what takes long for a reason.
        "statement_timeout": "0",
        "lock_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
        "default_transaction_isolation": "read\\ committed",
        "default_transaction_read_only": "off",
        "default_transaction_deferrable": "off",
        "row_security": "off",
        "synchronize_seqscans": "off",
        # Statements on the catalogs look costly to the planner: compiling one took 75 ms, running it 4, every 5 s.
        "jit": "off",
        # No session of pmgsync's waits for what capture confirms; with "local" a commit is on this server's disk.
        "synchronous_commit": "local",
        # What pmgsync does to the schema is no change that travels.
        "pmgsync.internal": "on",
    }
)
"""Settings of every session, as `-c name=value` in libpq's `options` (a backslash keeps a space)."""

_BYTES_OIDS = (
    *(18, 19, 25, 1042, 1043, 705),  # "char", name, text, bpchar, varchar, unknown
    *(114, 142, 194, 3220, 3802),  # json, xml, pg_node_tree, pg_lsn, jsonb
)


def connect(dsn: str, *, dbname: str | None = None, application_name: str, replica: bool = False) -> Connection:
    """Open a session with the pinned settings. Text comes back as bytes; integers, booleans and floats as such.

    Args:
        dsn: as libpq reads it.
        dbname: another database of the same server.
        replica: triggers and foreign keys do not fire (session_replication_role).

    Raises:
        UnreachableError: when the server does not let this session in.
    """
    settings = dict(PINNED)
    if replica:
        settings["session_replication_role"] = "replica"
    encoding = settings.pop("client_encoding")
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    extra = {} if dbname is None else {"dbname": dbname}
    whole = psycopg2.extensions.make_dsn(
        dsn, options=options, client_encoding=encoding, application_name=application_name, **extra
    )
    try:
        connection: Connection = psycopg2.connect(whole)
    except psycopg2.OperationalError as error:
        raise UnreachableError(
            f"the database does not accept a session ({str(error).strip()})",
            hint="see whether PostgreSQL runs and lets this user in",
        ) from error
    for oid in _BYTES_OIDS:
        # Decoding would fail: what a database holds need not be text in any encoding.
        connection.string_types[oid] = psycopg2.extensions.BYTES
    return connection


def rows(cursor: psycopg2.extensions.cursor) -> list[tuple[bytes | None, ...]]:
    """Return what a query gave, every value as bytes or None.

    Raises:
        TypeError: when a column has a type whose text would be lost; cast it to text in the query.
    """
    return [tuple(map(_bytes, row)) for row in cursor.fetchall()]


def _bytes(value: object) -> bytes | None:
    match value:
        case None | bytes():
            return value
        case bool():
            return b"t" if value else b"f"
        case int():
            return b"%d" % value
        case memoryview():
            return value.tobytes()
    raise TypeError(f"a query gave {type(value).__name__}, cast the column to text")


def quote_ident(name: bytes) -> bytes:
    """Return a name as an identifier that stands for exactly this name."""
    return b'"' + name.replace(b'"', b'""') + b'"'


def quote_literal(value: bytes | None) -> bytes:
    """Return a value as a literal of unknown type. Every server encoding keeps ASCII bytes for ASCII characters, and
    with standard_conforming_strings a quote is the only byte with a meaning."""
    return b"NULL" if value is None else b"'" + value.replace(b"'", b"''") + b"'"
