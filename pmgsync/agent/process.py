"""`python -m pmgsync.agent.process NAME`: one worker process, started and watched by the supervisor."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

from pmgsync.agent.worker import Worker
from pmgsync.config import NodeConfig, load_config
from pmgsync.errors import PmgsyncError
from pmgsync.service import die_with_parent, favour_latency, keep_freed_memory, set_up_logging

log = logging.getLogger(__name__)


def make_worker(name: str, config: NodeConfig) -> Worker:
    """Return the worker of a name: `capture`, `snapshot`, `files`, `divergence` or `apply:CID`."""
    kind, _, origin = name.partition(":")
    if kind == "apply":
        from pmgsync.agent.apply import ApplyWorker

        return ApplyWorker(config, int(origin))
    if kind == "capture":
        from pmgsync.agent.capture import CaptureWorker

        return CaptureWorker(config)
    if kind == "files":
        from pmgsync.agent.files import FilesWorker

        return FilesWorker(config)
    if kind == "divergence":
        from pmgsync.agent.divergence import DivergenceWorker

        return DivergenceWorker(config)
    from pmgsync.agent.snapshot import SnapshotWorker

    return SnapshotWorker(config)


def run() -> None:
    """Entry point of a worker process."""
    parser = argparse.ArgumentParser(prog="pmgsync-agent-worker")
    parser.add_argument("name")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    # Killed at any instant is the normal way to end: whatever matters is in the journal and the database.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logging()
    keep_freed_memory()
    try:
        worker = make_worker(arguments.name, load_config(arguments.config))
        favour_latency()
        worker.run()
    except PmgsyncError as error:
        log.error("action=stop worker=%s error=%s", arguments.name, error)
        sys.exit(1)


if __name__ == "__main__":
    run()
