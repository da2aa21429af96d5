"""This node, as a command finds it: its configuration, its broker if one is running, its cluster document."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cli.console import note
from pmgsync.errors import ConfigError, MembershipError, PmgsyncError, UnreachableError

if TYPE_CHECKING:
    import typer

    from broker.cluster.state_directory import StateDirectory
    from pmgsync.config import NodeConfig
    from pmgsync.wire.link import BrokerLink

ANSWER_S = 5.0
RELOAD_S = 10.0
"""Binding a port that was in use a moment ago may take the broker a while."""


def load(context: typer.Context) -> NodeConfig:
    """Return the configuration that the command was given.

    Raises:
        ConfigError: when it cannot be used.
    """
    from pmgsync.config import load_config

    return load_config(context.obj)


def cluster_defined(config: NodeConfig) -> bool:
    """Return True when this node holds a cluster document.

    Raises:
        ConfigError: when this user may not look.
    """
    from broker.cluster.state_directory import DOCUMENT_FILE

    try:
        return (config.state_dir / DOCUMENT_FILE).exists()
    except PermissionError:
        raise ConfigError(f"the state directory {config.state_dir} is closed to this user", hint="run pmgcm as root") \
            from None  # fmt: skip


@contextmanager
def broker(config: NodeConfig, *, timeout_s: float = ANSWER_S) -> Iterator[BrokerLink]:
    """Yield a session with this node's broker.

    Raises:
        UnreachableError: when it is not running.
    """
    from pmgsync.wire.link import BrokerLink

    path = config.broker_socket
    try:
        missing = not path.exists()
    except PermissionError:
        raise ConfigError(f"the run directory {path.parent} is closed to this user", hint="run pmgcm as root") from None
    if missing:
        raise UnreachableError("pmgsync-broker is not running here", hint="start it: systemctl start pmgsync-broker")
    with BrokerLink(path, "cli") as link:
        try:
            link.hello(timeout_s)
        except UnreachableError:
            # A broker that was killed leaves its socket behind.
            raise UnreachableError(
                "pmgsync-broker does not answer here", hint="look at it: systemctl status pmgsync-broker"
            ) from None
        yield link


@contextmanager
def member_broker(config: NodeConfig) -> Iterator[BrokerLink]:
    """Yield a session with the broker of this node, which is in a cluster.

    Raises:
        MembershipError: when it is not.
        UnreachableError: when the broker is not running.
    """
    from pmgsync.core.membership import no_cluster

    if not cluster_defined(config):
        raise no_cluster()
    with broker(config) as link:
        yield link


def read_status(link: BrokerLink, *, timeout_s: float = ANSWER_S) -> dict[str, Any]:
    """Return the status map of README.md, as this node's broker sees the cluster.

    Raises:
        PmgsyncError: when there is none.
    """
    answer, _ = link.request({"op": "status"}, timeout_s=timeout_s)
    status = answer["status"]
    assert isinstance(status, dict)
    return status


def tell_broker(config: NodeConfig) -> bool:
    """Have a running broker look at the state directory; one that starts later does by itself.

    Returns:
        False when there is no broker, or it could not do what the cluster document asks of it: the person is told.
    """
    try:
        with broker(config, timeout_s=2.0) as link:
            link.request({"op": "reload"}, timeout_s=RELOAD_S)
            return True
    except UnreachableError:
        note("note: pmgsync-broker is not running here; start it: systemctl start pmgsync-broker pmgsync-agent")
    except PmgsyncError as error:
        note(f"note: pmgsync-broker cannot take its place in the cluster yet: {error}")
    return False


def held_document(state: StateDirectory) -> None:
    """Refuse when a cluster is defined here already; the document of one that this node was removed from is none.

    Raises:
        MembershipError: when it is.
    """
    signed = state.document()
    if signed is not None and state.own_cid(signed.document):
        raise MembershipError(
            "cluster already defined",
            hint=f"this node belongs to the cluster {signed.document.name!r}; `pmgcm status` shows it",
        )
