"""Holds a demo cluster: the process that starts its servers and services, and that leaves none of them behind.

It is a process of its own, so that whatever happens to the command in front of it, kill -9 included, everything is
stopped and removed: it does so as soon as its standard input ends, unless it was told to keep it. It writes a line of
JSON to standard output: what it started, or what was wrong; and one for each order to kill or start a machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from types import FrameType

from cli.demo.machine import DemoNode, Machine, start_server
from pmgsync.errors import PmgsyncError

ADDRESS = "127.0.0.1"
PORTS_OF_A_NODE = 4
"""Events, control, join and key."""
KEEP = b"keep\n"
PORTS = range(30_000, 32_768)
"""Below the range that outgoing connections take theirs from."""


class _TerminatedError(BaseException):
    """SIGTERM came: clean up and end."""


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nobody listens on now."""
    found: list[int] = []
    with ExitStack() as held:
        for port in random.sample(PORTS, len(PORTS)):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise PmgsyncError(f"fewer than {count} ports are free on {ADDRESS}")


def write_config(node: DemoNode, ports: Sequence[int]) -> None:
    """Write a node's node.toml."""
    events, control, join, key = ports
    directory = Path(node.directory)
    quoted = {key: json.dumps(value) for key, value in asdict(node).items()}
    Path(node.config).write_text(
        f"[node]\nname = {quoted['name']}\naddress = {json.dumps(ADDRESS)}\n"
        f"state_dir = {json.dumps(str(directory / 'state'))}\nrun_dir = {json.dumps(str(directory / 'run'))}\n"
        f"profile = {json.dumps(str(write_profile(directory)))}\n"
        f"[ports]\nevents = {events}\ncontrol = {control}\njoin = {join}\nkey = {key}\n"
        # Whatever gateway there is on this machine has nothing to do with it.
        f'[postgres]\ndsn = {quoted["dsn"]}\n[files]\ncluster_conf = ""\n'
        f"config_root = {json.dumps(str(directory / 'etc'))}\nspool_root = {json.dumps(str(directory / 'spool'))}\n",
        encoding="utf-8",
    )


def write_profile(directory: Path) -> Path:
    """Write the profile `pmg` without what would touch the gateway of this machine, and return its path.

    That is a directory that no setting moves, and the commands to run after changes.
    """
    text = (resources.files("pmgsync") / "profiles/pmg.toml").read_text(encoding="utf-8")
    first, elsewhere, rest = text.partition('[[files]]\nkind = "config"\nroot = "/etc/mail/spamassassin"')
    spool, actions, _ = rest.partition("# --- what to do after a change")
    if not elsewhere or not actions:
        raise PmgsyncError("the profile pmg is not as the demo expects it")
    path = directory / "pmg.toml"
    path.write_text(first + "\n".join(spool.partition("\n\n")[2:]), encoding="utf-8")
    return path


def start_cluster(stack: ExitStack, count: int) -> tuple[Path, list[Machine]]:
    """Start everything of `count` nodes and return its directory and the machines; no cluster is defined yet."""
    directory = Path(tempfile.mkdtemp(prefix="pmgsync-demo-"))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    ports = free_ports(PORTS_OF_A_NODE * count)
    machines = []
    for number in range(1, count + 1):
        home = directory / f"pmg{number}"
        (home / "spool").mkdir(parents=True)
        machine = Machine(start_server(stack))
        node = machine.node = DemoNode(f"pmg{number}", machine.dsn, str(home / "node.toml"), str(home))
        write_config(node, ports[PORTS_OF_A_NODE * (number - 1) : PORTS_OF_A_NODE * number])
        machines.append(machine)
    for machine in machines:
        stack.callback(machine.stop)
        machine.start()
    return directory, machines


def main() -> None:
    """Start a cluster of argv[1] nodes and hold it until standard input ends or SIGTERM comes."""
    signal.signal(signal.SIGTERM, _terminate)
    with contextlib.suppress(_TerminatedError), ExitStack() as stack:
        try:
            directory, machines = start_cluster(stack, int(sys.argv[1]))
        except Exception as error:
            _answer(_described(error))
            return
        nodes = [asdict(machine.node) for machine in machines if machine.node is not None]
        _answer({"directory": str(directory), "nodes": nodes})
        for line in iter(sys.stdin.buffer.readline, b""):
            if line == KEEP:
                break
            _answer(_carry_out(machines, line.decode()))
        else:
            # Now, within the block: a signal that comes when it is being left would keep its callbacks from running.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return
        # The command that started this ends, and with it what these were connected to.
        with Path(os.devnull).open("r+b") as null:
            for stream in (0, 1, 2):
                os.dup2(null.fileno(), stream)
        signal.pause()


def _carry_out(machines: Sequence[Machine], line: str) -> dict[str, str]:
    """Do what the demo asks: `kill N` or `start N`, N from 0."""
    order, _, number = line.partition(" ")
    try:
        machine = machines[int(number)]
        machine.kill() if order == "kill" else machine.start()
    except Exception as error:
        return _described(error)
    return {}


def _described(error: Exception) -> dict[str, str]:
    if isinstance(error, PmgsyncError):
        return {"error": error.message, "hint": error.hint}
    return {"error": f"{type(error).__name__}: {error}", "hint": ""}


def _answer(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedError


if __name__ == "__main__":
    main()
