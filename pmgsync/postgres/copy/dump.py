"""Schema dumps: finds a pg_dump that fits the server, runs it on an exported snapshot, and returns plain SQL."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import psycopg2.extensions

from pmgsync.core.profile import OWN_SCHEMA
from pmgsync.errors import ConfigError, PmgsyncError
from pmgsync.postgres.programs import BINDIR_VARIABLE, find_binaries

INSTALLED = Path("/usr/lib/postgresql")
LOCK_WAIT = "10s"
"""pg_dump locks every table for an instant; one that is being altered is waited for so long."""
POLL_S = 0.2

_SECRETS = {"password": "PGPASSWORD", "passfile": "PGPASSFILE", "sslpassword": "PGSSLPASSWORD"}


class SchemaBusyError(PmgsyncError):
    """The schema is being changed; reading it may succeed later."""

    recoverable = True


def find_pg_dump(server_major: int) -> Path:
    """Return a pg_dump for a server: of the same major version if there is one, else of the nearest later one.

    Raises:
        ConfigError: when there is none.
    """
    found = installed_pg_dumps()
    fitting = sorted(major for major in found if major >= server_major)
    if not fitting:
        seen = ", ".join(f"{path} is of version {major}" for major, path in sorted(found.items())) or "none was found"
        raise ConfigError(
            f"no pg_dump of PostgreSQL {server_major} or later is installed on this node ({seen})",
            hint=f"install postgresql-client-{server_major}, or name a directory of programs in {BINDIR_VARIABLE}",
        )
    return found[fitting[0]]


def installed_pg_dumps() -> dict[int, Path]:
    """Return this machine's pg_dump programs by major version."""
    found: dict[int, Path] = {}
    for directory in _directories():
        major = _major(directory / "pg_dump")
        if major is not None:
            found.setdefault(major, directory / "pg_dump")
    return found


def _directories() -> Iterator[Path]:
    named = os.environ.get(BINDIR_VARIABLE)
    if named:
        yield Path(named)
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        done = subprocess.run([pg_config, "--bindir"], check=False, capture_output=True, text=True)
        if not done.returncode:
            yield Path(done.stdout.strip())
    yield from (path / "bin" for path in sorted(INSTALLED.glob("[0-9]*")))
    on_path = shutil.which("pg_dump")
    if on_path is not None:
        yield Path(on_path).parent
    try:
        yield find_binaries()
    except PmgsyncError:
        return


def _major(program: Path) -> int | None:
    if not os.access(program, os.X_OK):
        return None
    done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    match = re.search(r"\(PostgreSQL\) (\d+)", done.stdout)
    return int(match[1]) if match else None


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
    # Command lines are everybody's to read; the environment is not.
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
