"""The line `join`: a database of some gigabytes copied by `pmgcm join`, pg_dump and pg_restore, native's sync.

Neither does pg_restore take a pipe when it works in parallel, nor pg_dump write its custom format so: they use the
directory format, as an administrator would.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pmgsync.postgres.programs import pg_tool, tool_environment
from tests.bench.lines import Turn
from tests.bench.ours import Ours
from tests.bench.processes import Meter
from tests.bench.report import Contender
from tests.bench.servers import Servers, ask, await_mark, compare

BYTES = 2 << 30
ROW_BYTES = 220
"""Of a row with its share of the key's index, about."""
TABLES, JOBS = 4, 2
CONTENDERS: tuple[Contender, ...] = (("dump and restore", ""), ("native", "off"), ("ours", "on"))
_SCHEMA = "CREATE TABLE mark (id bigint PRIMARY KEY);\n" + "\n".join(
    f"CREATE TABLE part{number} (id bigint PRIMARY KEY, at timestamptz NOT NULL, text text NOT NULL);"
    for number in range(TABLES)
)


def take_join(servers: Servers, scale: float, say: Callable[[str], None]) -> tuple[str, dict[Contender, list[Turn]]]:
    """Take one turn each and return the line's title and what they gave."""
    rows = max(1000, round(BYTES * scale / ROW_BYTES / TABLES))
    ours = Ours(servers, _SCHEMA)
    publisher = servers.create_database(servers.publisher, "ours")
    ask(publisher, _SCHEMA)
    for number in range(TABLES):
        values = f"SELECT i, now(), repeat(md5(i::text), 4) FROM generate_series(1, {rows}) AS i"
        ask(publisher, f"INSERT INTO part{number} {values}")
    ask(publisher, "VACUUM ANALYZE")
    size = ask(publisher, "SELECT pg_database_size(current_database())")[0][0] / (1 << 20)
    turns: dict[Contender, list[Turn]] = {}
    try:
        for who, copy in zip(CONTENDERS, (_dump_and_restore, _native, _join), strict=True):
            servers.rest()
            turn = copy(servers, ours, publisher, rows * TABLES)
            turns[who] = [turn]
            say(f"join: {who[0]}: {turn.seconds:.1f} s")
    finally:
        ours.close()
    return f"a copy of a database of {size:,.0f} MiB", turns


def _dump_and_restore(servers: Servers, ours: Ours, publisher: str, rows: int) -> Turn:
    here = servers.create_database(servers.subscribers[0], "restored")
    directory = Path(tempfile.mkdtemp(prefix="pmgb-dump-"))
    try:
        begun = time.monotonic()
        for command in (
            ["pg_dump", "--format=directory", f"--jobs={JOBS}", f"--file={directory / 'd'}", publisher],
            ["pg_restore", f"--jobs={JOBS}", f"--dbname={here}", str(directory / "d")],
        ):
            subprocess.run([pg_tool(command[0]), *command[1:]], env=tool_environment(), check=True)
        ended = time.monotonic()
    finally:
        shutil.rmtree(directory)
    compare(publisher, [here])
    ask(servers.subscribers[0].dsn(), "DROP DATABASE restored")
    return Turn(ended - begun, rows)


def _native(servers: Servers, ours: Ours, publisher: str, rows: int) -> Turn:
    here = servers.create_database(servers.subscribers[0], "native")
    begun = time.monotonic()
    ask(here, _SCHEMA)
    ask(publisher, "CREATE PUBLICATION all_tables FOR ALL TABLES")
    ask(here, "CREATE SUBSCRIPTION s CONNECTION %s PUBLICATION all_tables WITH (binary = true)", (publisher,))
    while ask(here, "SELECT 1 FROM pg_subscription_rel WHERE srsubstate <> 'r' LIMIT 1"):
        time.sleep(0.05)
    ended = time.monotonic()
    compare(publisher, [here])
    ask(here, "DROP SUBSCRIPTION s")
    ask(publisher, "DROP PUBLICATION all_tables")
    ask(servers.subscribers[0].dsn(), "DROP DATABASE native")
    return Turn(ended - begun, rows)


def _join(servers: Servers, ours: Ours, publisher: str, rows: int) -> Turn:
    ours.create()
    servers.create_database(servers.subscribers[0], "ours")
    with Meter(ours.processes, sample=True) as meter:
        begun = time.monotonic()
        ours.join(ours.nodes[1])
        mark = ours.new_mark()
        ask(publisher, "INSERT INTO mark VALUES (%s)", (mark,))
        ended = await_mark(ours.subscribers, mark)
    compare(publisher, ours.subscribers)
    return Turn(ended - begun, rows, meter.cpu_s, meter.peak_mib)
