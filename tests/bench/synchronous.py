"""What synchronous mode costs a commit on the master of three nodes: `python -m tests.bench.synchronous`.

Single inserts, by one client and by many at once, with fsync. The settings take turns; what is printed is of all rounds
together.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psycopg2

from cli.demo.latency import percentile
from pmgsync.postgres.programs import BINDIR_VARIABLE, pg_tool
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.schema import SIMPLE

SETTINGS = ("off", "1", "2")
CLIENTS = (1, 8)


def commits_ms(node: Node, clients: int, count: int, first: int) -> tuple[list[float], float]:
    """Return how long each commit took, in ms, and how many there were a second; keys begin at `first`."""
    took: list[float] = []

    def write(number: int) -> None:
        with contextlib.closing(psycopg2.connect(node.server.dsn(node.dbname))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                for key in range(first + number, first + count, clients):
                    begun = time.perf_counter()
                    cursor.execute("INSERT INTO t VALUES (%s, 'a line of mail statistics')", (key,))
                    took.append((time.perf_counter() - begun) * 1000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took, count / (time.perf_counter() - begun)


def switch(node: Node, setting: str) -> None:
    """Set synchronous mode, and wait until it is so."""
    node.pmgcm("synchronous", setting)
    wanted = "off" if setting == "off" else "synchronous"
    eventually(lambda: node.status()["synchronous"]["state"] == wanted, what=f"the master is {wanted}")
    time.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=500)
    arguments = parser.parse_args()
    os.environ.setdefault(BINDIR_VARIABLE, str(Path(pg_tool("pgbench")).parent))
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(Path(directory), nodes=3, schema=SIMPLE)
        try:
            cluster.start()
            for node in cluster.nodes:
                node.server.set(fsync="on")
            cluster.wait()
            found: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
            first = 1
            for _ in range(arguments.rounds):
                for setting in SETTINGS:
                    switch(cluster.master, setting)
                    for clients in CLIENTS:
                        took, rate = commits_ms(cluster.master, clients, arguments.count, first)
                        first += arguments.count
                        times, rates = found.setdefault((clients, setting), ([], []))
                        times += took
                        rates.append(rate)
            for (clients, setting), (times, rates) in sorted(found.items()):
                print(
                    f"{clients} client{'s' if clients > 1 else ''}, synchronous {setting}: median "
                    f"{statistics.median(times):.2f} ms, 99th percentile {percentile(times, 0.99):.1f} ms, "
                    f"{statistics.median(rates):.0f} commits/s"
                )
        finally:
            cluster.close()


if __name__ == "__main__":
    main()
