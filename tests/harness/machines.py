"""Machines out of namespaces: each has a network, processes and a file system of its own, over the one of this machine.

What a machine writes is in memory and gone with it; what it reads is this machine's until it writes it. There is no
systemd in it: `systemctl` is a small program that starts a unit's ExecStart as the unit says (user, capabilities,
directories, umask), and cannot do more than the tests need.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

WRITABLE = ("/etc", "/var", "/opt", "/root", "/usr/local")
NETWORK = "10.77.0"
NEEDED = ("unshare", "nsenter", "ip", "setpriv", "pg_createcluster")

SYSTEMCTL = r"""#!/usr/bin/python3
# Stands in for systemd in a machine of the tests.
import os, re, subprocess, sys

command, *units = [word for word in sys.argv[1:] if not word.startswith("-")]
if command == "is-active":
    sys.exit(3)
for unit in units if command in ("enable", "start") else ():
    lines = open(f"/etc/systemd/system/{unit}.service").read().splitlines()
    said = dict(line.split("=", 1) for line in lines if re.match(r"[A-Za-z]+=", line))
    for key, parent in (("StateDirectory", "/var/lib"), ("RuntimeDirectory", "/run")):
        path = os.path.join(parent, said[key])
        os.makedirs(path, exist_ok=True)
        os.chmod(path, int(said[key + "Mode"], 8))
    os.umask(int(said["UMask"], 8))
    kept = ["+" + name.removeprefix("CAP_").lower() for name in said["CapabilityBoundingSet"].split()]
    caps = ",".join(["-all", *kept])
    argv = ["setpriv", f"--bounding-set={caps}", "--inh-caps=-all", "--no-new-privs", *said["ExecStart"].split()]
    log = os.open(f"/var/log/{unit}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    environment = {"PATH": os.environ["PATH"]}
    subprocess.Popen(argv, cwd="/", stdin=null, stdout=log, stderr=log, start_new_session=True, env=environment)
"""


def missing() -> str:
    """Return why there can be no machines here, "" when there can."""
    if os.geteuid() != 0:
        return "machines of namespaces need root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"not installed here: {', '.join(absent)}"
    script = (
        "mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w && "
        "mount -t overlay none -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w /etc"
    )
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", script], check=False, capture_output=True, text=True
    )
    return "" if not tried.returncode else f"no namespaces or overlays here: {tried.stderr.strip()}"


class Machine:
    """One machine; `with` starts it and ends everything in it."""

    def __init__(self, name: str, number: int, shown: Mapping[str, Path]) -> None:
        """Prepare.

        Args:
            shown: directories of this machine, by the paths below `WRITABLE` at which they stand in the new one.
        """
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.transcript: list[str] = []
        self._shown = shown
        self._init: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        layers = " && ".join(
            f"mkdir -p /mnt{path}/up /mnt{path}/work && "
            f"mount -t overlay none -o lowerdir={path},upperdir=/mnt{path}/up,workdir=/mnt{path}/work {path}"
            for path in WRITABLE
        )
        binds = "".join(f"mkdir -p {at} && mount --bind {path} {at} && " for at, path in self._shown.items())
        script = (
            f"mount -t tmpfs none /mnt && mount -t tmpfs none /run && {layers} && {binds}"
            f"mount -t tmpfs none /tmp && chmod 1777 /tmp && hostname {self.name} && ip link set lo up && "
            "echo ready && exec sleep infinity"
        )
        self._init = subprocess.Popen(
            ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._init.stdout is not None
        if self._init.stdout.readline() != b"ready\n":
            self.close()
            raise AssertionError(f"{self.name} did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the machine."""
        if self._init is not None:
            # Its first process is killed with it, and with that, by the kernel, all others.
            self._init.kill()
            self._init.wait()
            if self._init.stdout is not None:
                self._init.stdout.close()
            self._init = None

    @property
    def pid(self) -> int:
        """Process id, outside, of the machine's first process."""
        assert self._init is not None
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        return int(children[0])

    def within(self, *argv: str) -> list[str]:
        """Return the command that runs a program in the machine."""
        return ["nsenter", "-t", str(self.pid), "-m", "-n", "-u", "-i", "-p", "--", *argv]

    def sh(
        self, script: str, *, check: bool = True, given: str = "", timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the machine, as its administrator would.

        Raises:
            AssertionError: when it fails, unless `check` is False.
        """
        done = subprocess.run(
            self.within("sh", "-ec", script),
            check=False,
            capture_output=True,
            text=True,
            input=given,
            timeout=timeout_s,
        )
        said = done.stdout + done.stderr
        self.transcript += [f"{self.name}# {script}", said.rstrip()]
        if check and done.returncode:
            raise AssertionError(f"on {self.name}: {script}\nexit {done.returncode}\n{said}")
        return done

    def answer(self, command: str, answers: Sequence[tuple[str, str]], *, timeout_s: float = 120.0) -> str:
        """Run a command on a terminal in the machine and type an answer to each question; returns all that was shown.

        Raises:
            AssertionError: when a question does not come, or the command fails.
        """
        pid, terminal = pty.fork()
        if pid == 0:
            argv = self.within("sh", "-ec", command)
            os.execvp(argv[0], argv)
        shown, waiting, deadline = "", list(answers), time.monotonic() + timeout_s
        seen = 0
        try:
            while time.monotonic() < deadline:
                if not select.select([terminal], [], [], 0.5)[0]:
                    continue
                try:
                    data = os.read(terminal, 4096)
                except OSError:  # so a terminal says that nobody has it any more
                    break
                if not data:
                    break
                shown += data.decode(errors="replace")
                if waiting and waiting[0][0] in shown[seen:]:
                    seen = len(shown)
                    os.write(terminal, (waiting.pop(0)[1] + "\n").encode())
            else:
                os.kill(pid, signal.SIGKILL)
        finally:
            os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.transcript += [f"{self.name}# {command}", shown.replace("\r", "").rstrip()]
        assert not waiting and status == 0, f"on {self.name}: {command}\nexit {status}, {len(waiting)} left\n{shown}"
        return shown

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in the machine."""
        self.sh(f"mkdir -p $(dirname {path}); cat > {path}; chmod {mode:o} {path}", given=text)
        del self.transcript[-2:]


@contextlib.contextmanager
def joined_machines(names: Sequence[str], shown: Mapping[str, Path]) -> Iterator[list[Machine]]:
    """Start machines with a network between them; the n-th has the address 10.77.0.n."""
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(Machine("switch", 254, {}))
        switch.sh("ip link add switch type bridge && ip link set switch up")
        machines = [stack.enter_context(Machine(name, number, shown)) for number, name in enumerate(names, 1)]
        for number, machine in enumerate(machines, 1):
            subprocess.run(
                ["ip", "link", "add", "eth0", "netns", str(machine.pid), "type", "veth",
                 "peer", "name", f"port{number}", "netns", str(switch.pid)],
                check=True,
            )  # fmt: skip
            switch.sh(f"ip link set port{number} master switch up")
            machine.sh(f"ip address add {machine.address}/24 dev eth0 && ip link set eth0 up")
            machine.write("/usr/local/bin/systemctl", SYSTEMCTL, 0o755)
            machine.transcript.clear()
        yield machines


def steps_of(text: str) -> list[str]:
    """Return the commands of a text: its indented blocks, one script each."""
    blocks: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("       "):
            if not inside:
                blocks.append([])
            blocks[-1].append(line.strip())
            inside = True
        elif line.strip() or not inside:
            inside = False
    return ["\n".join(block) for block in blocks]
