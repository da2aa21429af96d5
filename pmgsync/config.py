"""node.toml: the configuration of one node, read and checked; an error names file, key and what was expected."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pmgsync.core.document import LEASE_MS, LONGEST_LEASE_MS, SHORTEST_LEASE_MS
from pmgsync.core.profile import FileTree
from pmgsync.errors import ConfigError
from pmgsync.toml_section import Section, as_absolute, as_list, as_text, one_of, read_toml

DEFAULT_PATH = Path("/etc/pmgsync/node.toml")
PATH_VARIABLE = "PMGCM_CONFIG"
SECTIONS = ("node", "ports", "postgres", "files", "journal", "subscription", "join", "cluster")
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
class Subscription:
    """Where this node's subscription level is found, and what a difference between nodes means.

    Attributes:
        level: the level itself, "" to look for it.
        file: a file that has it, "" for none.
        command: a program that prints it, and its arguments.
        pattern: a regular expression whose first group is the level; "" for the whole first line.
        differing: whether a node of another level is warned of or refused when it joins.
    """

    level: str = ""
    file: str = ""
    command: tuple[str, ...] = ()
    pattern: str = ""
    differing: Literal["warn", "refuse"] = "warn"


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Settings of the whole cluster, read by `pmgcm create` alone.

    Attributes:
        fence: `lease`: from three voters on the master writes only while a majority acknowledges it.
        lease_s: for how long an acknowledgement is good.
    """

    fence: Literal["lease", "none"] = "lease"
    lease_s: float = LEASE_MS / 1000


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
    synchronous_commit: bool
    config_root: Path | None
    spool_root: Path | None
    journal: JournalLimits
    key_port: int = 7673
    cluster_conf: str | None = None
    """The gateway's cluster.conf: a path, "" for none, None for the profile's."""
    subscription: Subscription = Subscription()
    cluster: ClusterSettings = ClusterSettings()
    row_wait_s: float = 5.0
    """So long a row that names a file of a spool waits for it."""
    pam_service: str = "login"
    """Of the master, for the root password of whoever joins; "" when only tokens open the door."""

    @property
    def broker_socket(self) -> Path:
        """The local socket of this node's broker."""
        return self.run_dir / SOCKET_NAME

    def root_of(self, rule: FileTree) -> Path:
        """Return where the root of a tree is on this node."""
        settings = {"config_root": self.config_root, "spool_root": self.spool_root}
        return settings.get(rule.setting) or Path(rule.root)


def _name(value: Any) -> str:
    if not _NAME.fullmatch(as_text(value)):
        raise ValueError
    return str(value)


def _path(value: Any) -> Path:
    return Path(as_absolute(value))


def _port(value: Any) -> int:
    if type(value) is not int or not 0 < value < 65536:
        raise ValueError
    return value


def _amount(units: dict[str, int]) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", as_text(value))
        if match is None or match[2] not in units or int(match[1]) == 0:
            raise ValueError
        return int(match[1]) * units[match[2]]

    return read


def _on_or_off(value: Any) -> bool:
    if value not in {"on", "off"}:
        raise ValueError
    return bool(value == "on")


def _seconds(value: Any) -> float:
    if type(value) not in {int, float} or not 0 <= value <= 60:
        raise ValueError
    return float(value)


def _dsn(value: Any) -> str:
    text = as_text(value)
    if "=" not in text and "://" not in text:
        raise ValueError
    return text


def load_config(path: Path | None = None) -> NodeConfig:
    """Return the configuration in a file; without one, of $PMGCM_CONFIG or /etc/pmgsync/node.toml.

    Raises:
        ConfigError: when the file cannot be read, or says something that cannot be used.
    """
    path = path or Path(os.environ.get(PATH_VARIABLE) or DEFAULT_PATH)
    top = read_toml(path, "the configuration", hint=f"name another file with --config or ${PATH_VARIABLE}")
    sections = [top.section(name) for name in SECTIONS]
    top.end()
    node, ports, postgres, files, journal, subscription, join, cluster = sections
    absolute, port = "an absolute path", "a port number, 1 to 65535"
    limits = JournalLimits()
    config = NodeConfig(
        path=path,
        name=node.take("name", None, "a name of letters, digits, '.', '_' and '-'", _name) or socket.gethostname(),
        address=node.take("address", None, "an IP address or host name", as_text) or _own_address(),
        state_dir=node.take("state_dir", Path("/var/lib/pmgsync"), absolute, _path),
        run_dir=node.take("run_dir", Path("/run/pmgsync"), absolute, _path),
        profile=node.take("profile", "pmg", "the name of a shipped profile or the path of a file", as_text),
        events_port=ports.take("events", 7670, port, _port),
        control_port=ports.take("control", 7671, port, _port),
        join_port=ports.take("join", 7672, port, _port),
        key_port=ports.take("key", 7673, port, _port),
        dsn=postgres.take(
            "dsn", "host=/var/run/postgresql dbname=Proxmox_ruledb user=postgres", "a libpq connection string", _dsn
        ),
        synchronous_commit=postgres.take("synchronous_commit", True, '"on" or "off"', _on_or_off),
        config_root=files.take("config_root", None, absolute, _path),
        spool_root=files.take("spool_root", None, absolute, _path),
        journal=JournalLimits(
            journal.take("max_size", limits.max_bytes, 'a size such as "4GiB"', _amount(_SIZES)),
            float(journal.take("max_age", limits.max_age_s, 'a time such as "7d"', _amount(_TIMES))),
        ),
        cluster_conf=files.take("cluster_conf", None, f'{absolute}, or "" for none', _none_or(as_absolute)),
        row_wait_s=files.take("row_wait_s", 5.0, "seconds, 0 to 60", _seconds),
        subscription=_subscription(subscription),
        cluster=_cluster(cluster),
        pam_service=join.take("pam_service", "login", 'the name of a PAM service, or "" for none', _none_or(_name)),
    )
    for section in sections:
        section.end()
    if len({config.events_port, config.control_port, config.join_port, config.key_port}) < 4:
        raise ConfigError(f"{path}: [ports] events, control, join and key are not four different ports")
    if len(os.fsencode(config.broker_socket)) > SOCKET_PATH_BYTES:
        raise ConfigError(
            f"{path}: [node] run_dir is too long: a unix socket's path has at most {SOCKET_PATH_BYTES} bytes",
            hint="choose a shorter one, such as /run/pmgsync",
        )
    return config


def _none_or(read: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "" if value == "" else read(value)


def _pattern(value: Any) -> str:
    try:
        if re.compile(as_text(value)).groups < 1:
            raise ValueError
    except re.error as error:
        raise ValueError from error
    return str(value)


def _command(value: Any) -> tuple[str, ...]:
    words = tuple(map(as_text, as_list(value)))
    if not words:
        raise ValueError
    return words


def _subscription(section: Section) -> Subscription:
    allowed: tuple[Literal["warn", "refuse"], ...] = ("warn", "refuse")
    found = Subscription(
        level=section.take("level", "", "a word", as_text),
        file=section.take("file", "", "an absolute path", as_absolute),
        command=section.take("command", (), "a list: a program and its arguments", _command),
        pattern=section.take("pattern", "", "a regular expression with a group in it", _pattern),
        differing=section.take("differing", "warn", 'one of "warn", "refuse"', one_of(*allowed)),
    )
    given = [key for key in ("level", "file", "command") if getattr(found, key)]
    if len(given) > 1:
        raise section.fail(given[1], f"has no meaning beside {given[0]}: one of them says where the level is found")
    return found


def _lease(value: Any) -> float:
    if type(value) not in {int, float} or not SHORTEST_LEASE_MS <= value * 1000 <= LONGEST_LEASE_MS:
        raise ValueError
    return float(value)


def _cluster(section: Section) -> ClusterSettings:
    fences: tuple[Literal["lease", "none"], ...] = ("lease", "none")
    default = ClusterSettings()
    return ClusterSettings(
        fence=section.take("fence", default.fence, 'one of "lease", "none"', one_of(*fences)),
        lease_s=section.take("lease_s", default.lease_s, "seconds, 1 to 300", _lease),
    )


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
