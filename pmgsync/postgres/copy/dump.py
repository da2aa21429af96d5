"""Schema dumps: runs pg_dump on an exported snapshot and returns plain SQL."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

import psycopg2.extensions

from pmgsync.core.profile import OWN_SCHEMA
from pmgsync.errors import PmgsyncError

LOCK_WAIT = "10s"
"""pg_dump locks every table for an instant; it waits so long for one that is being altered."""
POLL_S = 0.2

_SECRETS = {"password": "PGPASSWORD", "passfile": "PGPASSFILE", "sslpassword": "PGSSLPASSWORD"}


class SchemaBusyError(PmgsyncError):
    """The schema is being changed; reading it may succeed later."""

    recoverable = True


def dump_schema(dsn: str, program: Path, *, section: str, snapshot: str) -> Generator[None, None, bytes]:
    """Return, as the generator's value, a section's SQL as bytes; yields now and then while pg_dump runs.

    Args:
        section: `pre-data` or `post-data`.
        snapshot: the name of an exported snapshot.

    Raises:
        SchemaBusyError: when a table stays locked.
        PmgsyncError: when pg_dump fails.
    """
    parameters = psycopg2.extensions.parse_dsn(dsn)
    environment = {key: value for key, value in os.environ.items() if key != "PGOPTIONS"}
    # Everybody can read command lines, but not the environment.
    for key, variable in _SECRETS.items():
        if key in parameters:
            environment[variable] = parameters.pop(key)
    parameters["application_name"] = "pmgsync snapshot"
    command = [
        str(program),
        f"--dbname={psycopg2.extensions.make_dsn(**parameters)}",
        "--schema-only",
        f"--section={section}",
        f"--snapshot={snapshot}",
        f"--exclude-schema={OWN_SCHEMA}",
        "--no-publications",
        "--no-subscriptions",
        "--no-tablespaces",
        # Bytes as they are: a conversion could fail, and the restoring session takes them as they are, too.
        "--encoding=SQL_ASCII",
        f"--lock-wait-timeout={LOCK_WAIT}",
        "--no-password",
    ]
    # Into files: a pipe that nobody reads would stop pg_dump.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment)
        try:
            while True:
                try:
                    process.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    yield
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
        if process.returncode:
            if "lock timeout" in said or "could not obtain lock" in said:
                raise SchemaBusyError("the schema cannot be read, a table stays locked")
            raise PmgsyncError(f"pg_dump failed ({said or f'exit code {process.returncode}'})")
        output.seek(0)
        return plain_sql(output.read())


_HEAD_END = b"\nSELECT pg_catalog.set_config('search_path'"
_TAIL_BEGIN = b"\n-- PostgreSQL database dump complete\n"
# pg_dump's guard against psql's own commands in a dump, and a setting that servers before 17 do not know.
_HEAD_ONLY = re.compile(rb"^(?:\\restrict [^\n]*|SET transaction_timeout = 0;)$", re.MULTILINE)


def plain_sql(dump: bytes) -> bytes:
    """Return a dump without what only psql understands; what lies between head and tail is not looked at."""
    head, head_end, rest = dump.partition(_HEAD_END)
    body, _, _ = rest.rpartition(_TAIL_BEGIN)
    return _HEAD_ONLY.sub(b"", head) + head_end + (body or rest)
