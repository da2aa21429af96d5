"""Trees of files beside `rsync -a --delete`: python -m tests.bench.files [--scale S]. Prints a table.

Two nodes on this machine, each with a broker and a files worker; rsync copies between two directories with no network
at all. So rsync's figures are the best it can do, ours have two brokers, CURVE and a loopback connection in them.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import psutil

from tests.harness.cluster import Cluster, Node

NEW_FILES, NEW_BYTES = 20_000, 20_000
TREE_FILES, CHANGED = 100_000, 100
RATE_PER_S, RATE_S = 1000, 10
REST_S = 10.0
PROFILE = """
name = "files"
all_tables = true
[[files]]
kind = "spool"
root = "/spool"
setting = "spool_root"
tree = "cluster/{cid}"
"""


def write_files(root: Path, count: int, size: int, name: str) -> None:
    """Write files of random content, 200 in a directory."""
    rng = random.Random(count)
    for number in range(count):
        path = root / f"{number // 200:04d}"
        if number % 200 == 0:
            path.mkdir(parents=True, exist_ok=True)
        (path / f"{name}{number}").write_bytes(rng.randbytes(size))


def rsync(source: Path, target: Path) -> tuple[float, float]:
    """Return seconds and CPU seconds of one run."""
    before, begun = os.times(), time.monotonic()
    subprocess.run(["rsync", "-a", "--delete", "--exclude=.pmgsync", f"{source}/", f"{target}/"], check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - begun, cpu


def cpu_of(nodes: list[Node]) -> float:
    """Return the CPU seconds of the files workers and brokers so far."""
    found = 0.0
    for node in nodes:
        for process in (node.workers()["files"], psutil.Process(node.processes["broker"].pid)):
            used = process.cpu_times()
            found += used.user + used.system
    return found


def count(root: Path) -> int:
    """Return how many files a tree has; pmgsync's own are not counted."""
    return sum(len(names) for at, _, names in os.walk(root) if ".pmgsync" not in at)


def await_files(root: Path, wanted: int, within_s: float = 300.0) -> None:
    """Wait until a tree has so many files."""
    deadline = time.monotonic() + within_s
    while (found := count(root)) < wanted:
        if time.monotonic() > deadline:
            raise SystemExit(f"{found} of {wanted} files after {within_s:.0f} s")
        time.sleep(0.1)


def run(directory: Path, scale: float) -> None:
    """Take all lines."""
    profile = directory / "files.toml"
    profile.write_text(PROFILE)
    cluster = Cluster(
        directory / "cluster", profile=str(profile), schema="CREATE TABLE t (id int PRIMARY KEY)",
        extra='[files]\nspool_root = "{directory}/spool"',
    )  # fmt: skip
    try:
        cluster.start()
        nodes = cluster.nodes
        here, there = (node.directory / "spool/cluster/1" for node in nodes)
        beside = directory / "rsync"
        for node in nodes:
            (node.directory / "spool").mkdir(exist_ok=True)
        source = directory / "new"
        files = int(NEW_FILES * scale)
        write_files(source, files, NEW_BYTES, "mail")
        theirs, _ = rsync(source, beside)
        source.rename(directory / "spool-new")
        here.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        for part in sorted((directory / "spool-new").iterdir()):
            part.rename(here / part.name)
        await_files(there, files)
        print(f"{files} new files of {NEW_BYTES} bytes: rsync {theirs:.1f} s, pmgsync {time.monotonic() - begun:.1f} s")

        more = int(TREE_FILES * scale) - files
        write_files(directory / "more", more, 200, "small")
        (directory / "more").rename(here / "more")
        await_files(there, files + more)
        rsync(here, beside)
        rng = random.Random(1)
        names = sorted(path for path in here.rglob("*") if path.is_file() and ".pmgsync" not in str(path))
        chosen = rng.sample(names, CHANGED)
        for path in chosen:
            path.write_bytes(rng.randbytes(300))
        theirs, _ = rsync(here, beside)
        for path in chosen:
            path.write_bytes(rng.randbytes(301))
        last = [there / path.relative_to(here) for path in chosen]
        begun = time.monotonic()
        while any(path.stat().st_size != 301 for path in last):
            time.sleep(0.005)
        ours = time.monotonic() - begun
        print(f"{CHANGED} of {files + more} files changed: rsync {theirs:.2f} s, pmgsync {ours:.2f} s")

        rsync(here, beside)
        _, theirs_cpu = rsync(here, beside)
        time.sleep(3.0)
        before = cpu_of(nodes)
        time.sleep(REST_S)
        ours = cpu_of(nodes) - before
        print(
            f"nothing changed: rsync {theirs_cpu:.2f} CPU s a run, pmgsync {ours:.2f} CPU s in {REST_S:.0f} s, "
            "heartbeats of both nodes among it"
        )

        flow = here / "flow"
        made: dict[str, float] = {}
        seen: dict[str, float] = {}
        flow.mkdir()
        begun, total = time.monotonic(), int(RATE_PER_S * RATE_S * scale)
        data = os.urandom(2000)
        for number in range(total):
            time.sleep(max(0.0, begun + number / RATE_PER_S - time.monotonic()))
            made[str(number)] = time.monotonic()
            (flow / str(number)).write_bytes(data + str(number).encode())
            if number % 20 == 0:
                _note(there / "flow", seen)
        while len(seen) < total and time.monotonic() - begun < RATE_S * 6:
            _note(there / "flow", seen)
            time.sleep(0.005)
        lags = sorted(at - made[name] for name, at in seen.items())
        print(
            f"{RATE_PER_S} new files a second, {len(lags)} of {total}: median {statistics.median(lags) * 1000:.0f} ms, "
            f"99th percentile {lags[int(len(lags) * 0.99) - 1] * 1000:.0f} ms"
        )
    finally:
        cluster.close()


def _note(root: Path, seen: dict[str, float]) -> None:
    now = time.monotonic()
    if root.is_dir():
        for path in root.iterdir():
            seen.setdefault(path.name, now)


def main() -> None:
    """Run it in a directory of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp/pmgsync-bench-files"))
    chosen = parser.parse_args()
    shutil.rmtree(chosen.directory, ignore_errors=True)
    chosen.directory.mkdir(parents=True)
    try:
        run(chosen.directory, chosen.scale)
    finally:
        shutil.rmtree(chosen.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
