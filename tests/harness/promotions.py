"""Promotions that are watched: a step is waited for, something is killed at it, and the command is run again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cli.promote import read_plan
from pmgsync.wire.link import BrokerLink
from tests.harness.cluster import Node, eventually


def plan_of(node: Node) -> dict[str, Any]:
    """Return what a promotion of a node would do, from the broker itself: it is asked many times."""
    with BrokerLink(node.run_dir / "broker.sock", "cli") as link:
        link.hello()
        return read_plan(link, force=False)


@contextmanager
def begun(node: Node, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run `pmgcm promote --yes` beside the test."""
    command = [sys.executable, "-m", "cli.main", "--config", str(node.config), "promote", "--yes", *arguments]
    process = subprocess.Popen(
        [*node.within, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def await_step(process: subprocess.Popen[str], step: str) -> str:
    """Read what `pmgcm promote` says until a step is shown; returns it."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if step in line:
            break
    return text


def kill_service(node: Node, service: str) -> None:
    """Kill a service of a node, the agent with its workers."""
    workers = list(node.workers().values()) if service == "agent" else []
    node.kill(service)
    for worker in workers:
        worker.kill()


def again_until_master(heir: Node) -> None:
    """Run the command again, as its hints say, until the node is the master."""

    def is_master() -> bool:
        done = heir.pmgcm("promote", "--yes", check=False)
        print(done.stdout, done.stderr)
        return done.returncode == 0 or "already master" in done.stderr

    eventually(is_master, within_s=120, what="the promotion succeeds when it is run again")
