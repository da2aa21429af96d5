"""One run of the tests: where its files are, which servers it has, and that nothing of it is left when it is over.

The process that begins the run (with xdist: the controller) makes a scratch directory and passes it on in the
environment, which every process of the run inherits. That is how a process that outlives the run is found.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pmgsync.postgres.programs import BINDIR_VARIABLE, find_binaries

SCRATCH_VARIABLE = "PMGSYNC_TESTS_SCRATCH"
VERSIONS_VARIABLE = "PMGSYNC_TESTS_VERSIONS"
EXAMPLES_VARIABLE = "PMGSYNC_EXAMPLES"
_PREFIX = "pmgsync-tests-"
_LOCK = "lock"
_MEMORY = Path("/dev/shm")
_MEMORY_BYTES = 4 << 30
_GOING_S = 15.0


@dataclass(frozen=True)
class Version:
    """A PostgreSQL to test on: how the tests call it, and where its programs are."""

    name: str
    bindir: str


def begin() -> None:
    """Begin a run; nothing happens in a process that takes part in one."""
    if SCRATCH_VARIABLE in os.environ:
        return
    # While temporary files still go where programs may be executed: those of a closed environment are copied there.
    found = _installed_versions()
    usual = tempfile.gettempdir()
    place = _place(Path(usual))
    _remove_stale(place)
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    scratch.chmod(0o755)
    # Held until this process ends.
    lock = os.open(scratch / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.environ[SCRATCH_VARIABLE] = os.environ["TMPDIR"] = str(scratch)
    os.environ[VERSIONS_VARIABLE] = os.pathsep.join(f"{version.name}={version.bindir}" for version in found)
    # State directories stay where fsync is one.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", usual)
    os.environ.setdefault(BINDIR_VARIABLE, found[0].bindir)
    tempfile.tempdir = None
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        # Hundreds of processes would compile everything anew.
        os.environ["PYTHONPYCACHEPREFIX"] = str(scratch / "pycache")


def examples(usual: int) -> int:
    """Return how many examples a property test has: `usual`, ten times as many in the campaign."""
    return usual * int(os.environ.get(EXAMPLES_VARIABLE) or 1)


def scratch_directory() -> Path:
    """Return the directory that all processes of this run share."""
    return Path(os.environ[SCRATCH_VARIABLE])


def versions() -> list[Version]:
    """Return what this run tests on: the one that was asked for, or the embedded and the installed one."""
    return [Version(*text.split("=", 1)) for text in os.environ[VERSIONS_VARIABLE].split(os.pathsep)]


def _installed_versions() -> list[Version]:
    if chosen := os.environ.get(BINDIR_VARIABLE):
        return [Version(Path(chosen).parent.name, chosen)]
    found = [Version("embedded", str(find_binaries()))]
    if shutil.which("pg_config") is not None:
        done = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=False)
        bindir = Path(done.stdout.strip() or "/nowhere")
        if (bindir / "initdb").exists():
            found.append(Version(bindir.parent.name, str(bindir)))
    return found


def _place(usual: Path) -> Path:
    """Return the place of the scratch directory: in memory when there is room.

    Data directories are a thousand files each, made and removed all the time. No test is about a crash of the machine.
    """
    with contextlib.suppress(OSError):
        room = min(shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available)
        if os.access(_MEMORY, os.W_OK | os.X_OK) and room >= _MEMORY_BYTES:
            return _MEMORY
    return usual


def _remove_stale(place: Path) -> None:
    """Remove what runs that were killed have left."""
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (path / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


# -- the end ----------------------------------------------------------------------------------------------------------


def end() -> list[str]:
    """End the run; returns a sentence for each thing that was left, after removing it."""
    scratch = scratch_directory()
    deadline = time.monotonic() + _GOING_S
    while (left := _processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = [f"process {process.pid} still runs: {_command(process)}" for process in left]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    found += [f"shared memory segment {segment} was left" for segment in _orphaned_segments()]
    found += [f"{path} was left" for path in sorted(scratch.iterdir()) if path.name not in _EXPECTED]
    shutil.rmtree(scratch, ignore_errors=True)
    return found


_EXPECTED = {_LOCK, "templates", "pycache"}


def _processes() -> list[psutil.Process]:
    """Return the living processes that were started in this run."""
    mine = str(scratch_directory())
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            started_here = process.pid != os.getpid() and process.environ().get(SCRATCH_VARIABLE) == mine
            if started_here and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:200]
    return "?"


def _orphaned_segments() -> list[int]:
    """Return the System V segments made since this run began that nobody is attached to and whose maker is gone."""
    began = psutil.Process().create_time()
    with contextlib.suppress(OSError):
        header, *lines = Path("/proc/sysvipc/shm").read_text().splitlines()
        segments = [dict(zip(header.split(), map(int, line.split()), strict=False)) for line in lines]
        return [
            segment["shmid"]
            for segment in segments
            if not segment["nattch"] and segment["ctime"] >= began and not psutil.pid_exists(segment["cpid"])
        ]
    return []
