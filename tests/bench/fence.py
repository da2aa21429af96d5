"""What the fence costs a master: pgbench on mirrored tables with and without it. `python -m tests.bench.fence`.

The rounds alternate, each on the same server; what is printed is medians. CPU is of the server's processes.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.membership import Member
from pmgsync.postgres.programs import pg_tool, tool_environment
from pmgsync.postgres.setup.guard import ensure_guard
from pmgsync.postgres.setup.lease import LeaseSession
from pmgsync.profile_file import load_profile
from tests.bench.processes import server_cpu_s
from tests.bench.work import PGBENCH_CLIENTS, pgbench_schema
from tests.harness.database import Database

OWN = Member(1, "gate1", "192.0.2.1", 1, 2, 3, b"c" * 32, b"s" * 32, "master")
LEASE_S = 10.0
SCALE = 5
SCRIPTS = {"TPC-B": ["--builtin=tpcb-like"], "one UPDATE by key": ["--builtin=simple-update"]}


@contextlib.contextmanager
def fenced(database: Database, *, fence: bool) -> Iterator[None]:
    """Put the database under the fence, its lease renewed each second as the agent does, or take it off."""
    profile = load_profile("mirror")
    ensure_guard(database.dsn, profile, master=OWN if fence else None, fenced=fence)
    if not fence:
        yield
        return
    over = threading.Event()

    def renew() -> None:
        with contextlib.closing(LeaseSession(database.dsn)) as lease:
            while True:
                lease.renew(time.monotonic() + LEASE_S)
                if over.wait(1.0):
                    return

    thread = threading.Thread(target=renew)
    thread.start()
    time.sleep(0.5)
    try:
        yield
    finally:
        over.set()
        thread.join()


def cpu_s(server: EmbeddedPostgres, database: Database) -> float:
    """Return the CPU seconds of the server, its sessions that have ended included."""
    while database.sql("SELECT 1 FROM pg_stat_activity WHERE application_name = 'pgbench'"):
        time.sleep(0.01)
    return server_cpu_s(server.pid)


def run(
    server: EmbeddedPostgres, database: Database, script: list[str], count: int, options: str
) -> tuple[float, float]:
    """Run pgbench; returns transactions per second, and the server's CPU in µs a transaction."""
    begun, before = time.monotonic(), cpu_s(server, database)
    subprocess.run(
        [
            pg_tool("pgbench"), "--no-vacuum", f"--scale={SCALE}", f"--client={PGBENCH_CLIENTS}", "--protocol=prepared",
            f"--transactions={count // PGBENCH_CLIENTS}", *script, f"{database.dsn} options='{options}'",
        ],
        env=tool_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    took_s = time.monotonic() - begun
    return count / took_s, (cpu_s(server, database) - before) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=20_000)
    arguments = parser.parse_args()
    with EmbeddedPostgres() as server:
        database = Database(server)
        database.sql("SET search_path = public;" + pgbench_schema(SCALE))
        database.provision(load_profile("mirror"))
        for name, script in SCRIPTS.items():
            for commit in ("off", "on"):
                found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
                for _ in range(arguments.rounds):
                    for fence in (False, True):
                        with fenced(database, fence=fence):
                            options = f"-c synchronous_commit={commit}"
                            found[fence].append(run(server, database, script, arguments.count, options))
                (tps, cpu), (tps_fenced, cpu_fenced) = (
                    (statistics.median(one[0] for one in runs), statistics.median(one[1] for one in runs))
                    for runs in found.values()
                )
                print(
                    f"{name}, synchronous_commit {commit}: {tps:.0f} -> {tps_fenced:.0f} transactions/s "
                    f"({tps_fenced / tps:.2f}), CPU {cpu:.0f} -> {cpu_fenced:.0f} µs each (+{cpu_fenced - cpu:.0f})",
                    flush=True,
                )
        print(f"pmgsync.writer: {database.sql('SELECT pg_relation_size($$pmgsync.writer$$)')[0][0]} bytes")


if __name__ == "__main__":
    main()
