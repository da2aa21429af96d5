"""`pmgcm`: the commands, and how each of their ends becomes a sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from cli.backup import backup
from cli.console import CommandFailedError, InterruptedBySignalError, note, print_error
from cli.create import create
from cli.decide import decide
from cli.delete import delete
from cli.demo.command import demo
from cli.divergence import divergence
from cli.doctor import doctor
from cli.files import files
from cli.hidden import hide_secrets
from cli.history import history
from cli.join import join
from cli.join_cmd import join_cmd
from cli.leave import leave
from cli.promote import promote
from cli.restore import restore
from cli.resync import resync
from cli.status import status
from cli.sync import sync
from cli.synchronous import synchronous
from cli.update_fingerprints import update_fingerprints
from cli.verify import verify
from cli.wait import wait
from pmgsync.errors import PmgsyncError

FAILED = 1
SIGNALLED = 128
"""Exit code of a command that a signal ended, plus the signal's number."""

app = typer.Typer(
    name="pmgcm",
    help="Manages a cluster of mail gateways: their databases and files are kept the same over ZeroMQ.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="PMGCM_CONFIG", help="node.toml; default: /etc/pmgsync/node.toml"),
    ] = None,
) -> None:
    """Options of every command."""
    context.obj = config


app.command()(create)
app.command("join-cmd")(join_cmd)
app.command()(join)
app.command()(status)
app.command()(wait)
app.command()(delete)
app.command()(leave)
app.command()(promote)
app.command()(sync)
app.command()(history)
app.command()(synchronous)
app.command("update-fingerprints")(update_fingerprints)
app.command()(doctor)
app.command()(files)
app.command()(verify)
app.command()(resync)
app.add_typer(divergence, name="divergence")
app.command()(decide)
app.command()(backup)
app.command()(restore)
app.command()(demo)


def run() -> None:
    """Entry point of `pmgcm`: 0 done, 1 failed, 2 wrong usage, 128 and the number when a signal ended it."""
    hide_secrets(sys.argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    # What is made in the state directory is for this user only.
    os.umask(0o077)
    try:
        app()
    except CommandFailedError:
        sys.exit(FAILED)
    except PmgsyncError as error:
        if _debugging():
            raise
        print_error(error)
        sys.exit(FAILED)
    except InterruptedBySignalError as end:
        note("interrupted")
        sys.exit(SIGNALLED + end.number)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        if _debugging():
            raise
        note(f"error: something that should not happen: {type(error).__name__}: {error}")
        note("hint: run it again with PMGCM_DEBUG=1 in the environment and report what it prints")
        sys.exit(FAILED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Once is enough: a second Ctrl-C must not cut the cleaning up short.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise InterruptedBySignalError(number)


def _debugging() -> bool:
    return os.environ.get("PMGCM_DEBUG", "") not in {"", "0"}


if __name__ == "__main__":
    run()
