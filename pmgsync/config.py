"""node.toml: the configuration of one node, read and checked; an error names file, key and what was expected."""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmgsync.errors import ConfigError

DEFAULT_PATH = Path("/etc/pmgsync/node.toml")
PATH_VARIABLE = "PMGCM_CONFIG"
SOCKET_NAME = "broker.sock"
SOCKET_PATH_BYTES = 107
"""The kernel's limit for the path of a unix socket."""

_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """What one chain's journal may hold: bytes, and the age of its oldest frame in seconds."""

    max_bytes: int = 4 << 30
    max_age_s: float = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A node's configuration; the keys are those of node.toml."""

    path: Path | None
    name: str
    address: str
    state_dir: Path
    run_dir: Path
    profile: str
    events_port: int
    control_port: int
    join_port: int
    dsn: str
    config_root: Path | None
    spool_root: Path | None
    journal: JournalLimits

    @property
    def broker_socket(self) -> Path:
        """The local socket of this node's broker."""
        return self.run_dir / SOCKET_NAME


class _Section:
    """One table of the file; every key that is asked for is known, every other one is an error."""

    def __init__(self, path: Path, name: str, values: object) -> None:
        self._path = path
        self._name = name
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: [{name}] is {values!r:.60}, expected a table")
        self._values: dict[str, Any] = values
        self._known: list[str] = []

    def take(self, key: str, default: Any, expected: str, read: Callable[[Any], Any]) -> Any:
        """Return a key's value as `read` makes it; ValueError and TypeError of `read` become a sentence."""
        self._known.append(key)
        if key not in self._values:
            return default() if callable(default) else default
        value = self._values[key]
        try:
            return read(value)
        except (ValueError, TypeError):
            where = f"{self._path}: [{self._name}] {key}"
            raise ConfigError(f"{where} is {value!r:.100}, expected {expected}") from None

    def end(self) -> None:
        """Refuse what was not asked for."""
        _refuse_unknown(self._path, f"[{self._name}] ", self._values, self._known)


def _refuse_unknown(path: Path, where: str, values: dict[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}"
            raise ConfigError(f"{path}: {where}{key} is not a key that pmgsync knows", hint=hint)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return value


def _name(value: Any) -> str:
    if not _NAME.fullmatch(_text(value)):
        raise ValueError
    return str(value)


def _absolute(value: Any) -> Path:
    path = Path(_text(value))
    if not path.is_absolute():
        raise ValueError
    return path


def _port(value: Any) -> int:
    if type(value) is not int or not 0 < value < 65536:
        raise ValueError
    return value


def _amount(units: dict[str, int]) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", _text(value))
        if match is None or match[2] not in units or int(match[1]) == 0:
            raise ValueError
        return int(match[1]) * units[match[2]]

    return read


def _dsn(value: Any) -> str:
    text = _text(value)
    if "=" not in text and "://" not in text:
        raise ValueError
    return text


def load_config(path: Path | None = None) -> NodeConfig:
    """Return the configuration in a file; without one, of $PMGCM_CONFIG or /etc/pmgsync/node.toml.

    Raises:
        ConfigError: when the file cannot be read, or says something that cannot be used.
    """
    path = path or Path(os.environ.get(PATH_VARIABLE) or DEFAULT_PATH)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the configuration {path} cannot be read ({error.strerror})",
            hint=f"name another file with --config or ${PATH_VARIABLE}",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not TOML ({error})") from error
    sections = ["node", "ports", "postgres", "files", "journal"]
    _refuse_unknown(path, "", data, sections)
    node, ports, postgres, files, journal = (_Section(path, name, data.get(name, {})) for name in sections)
    absolute = "an absolute path"
    limits = JournalLimits()
    config = NodeConfig(
        path=path,
        name=node.take("name", socket.gethostname, "a name of letters, digits, '.', '_' and '-'", _name),
        address=node.take("address", _own_address, "an IP address or host name", _text),
        state_dir=node.take("state_dir", Path("/var/lib/pmgsync"), absolute, _absolute),
        run_dir=node.take("run_dir", Path("/run/pmgsync"), absolute, _absolute),
        profile=node.take("profile", "pmg", "the name of a shipped profile or the path of a file", _text),
        events_port=ports.take("events", 7670, "a port number, 1 to 65535", _port),
        control_port=ports.take("control", 7671, "a port number, 1 to 65535", _port),
        join_port=ports.take("join", 7672, "a port number, 1 to 65535", _port),
        dsn=postgres.take(
            "dsn", "host=/var/run/postgresql dbname=Proxmox_ruledb user=postgres", "a libpq connection string", _dsn
        ),
        config_root=files.take("config_root", None, absolute, _absolute),
        spool_root=files.take("spool_root", None, absolute, _absolute),
        journal=JournalLimits(
            journal.take("max_size", limits.max_bytes, 'a size such as "4GiB"', _amount(_SIZES)),
            float(journal.take("max_age", limits.max_age_s, 'a time such as "7d"', _amount(_TIMES))),
        ),
    )
    for section in (node, ports, postgres, files, journal):
        section.end()
    if len({config.events_port, config.control_port, config.join_port}) < 3:
        raise ConfigError(f"{path}: [ports] events, control and join are not three different ports")
    if len(os.fsencode(config.broker_socket)) > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"{path}: [node] run_dir is too long: a unix socket's path has at most {SOCKET_PATH_BYTES} bytes",
            hint="choose a shorter one, such as /run/pmgsync",
        )
    return config


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
