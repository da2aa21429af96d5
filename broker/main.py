"""`pmgsync-broker`: the service. Runs in the foreground, logs to stderr, tells systemd when it is ready."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from pmgsync.config import load_config
from pmgsync.errors import PmgsyncError
from pmgsync.service import favour_latency, keep_freed_memory, notify_systemd, set_up_logging

log = logging.getLogger(__name__)


def run() -> None:
    """Entry point of `pmgsync-broker`."""
    parser = argparse.ArgumentParser(prog="pmgsync-broker", description="The network and the journal of a pmgsync node")
    parser.add_argument("--config", type=Path, help="node.toml; default: $PMGCM_CONFIG or /etc/pmgsync/node.toml")
    parser.add_argument("--verbose", action="store_true", help="log more")
    arguments = parser.parse_args()
    set_up_logging(verbose=arguments.verbose)
    keep_freed_memory()
    try:
        from broker.files import PRIVATE_UMASK, raise_descriptor_limit, refuse_open_files
        from broker.node import Broker

        os.umask(PRIVATE_UMASK)
        config = load_config(arguments.config)
        refuse_open_files(config.state_dir)
        raise_descriptor_limit()
        broker = Broker(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: broker.stop())
        favour_latency()
        notify_systemd("READY=1")
        log.info("action=start name=%s", broker.config.name)
        broker.run()
    except PmgsyncError as error:
        log.error("action=stop error=%s", error)
        sys.exit(1)
    log.info("action=stop")


if __name__ == "__main__":
    run()
