"""This node, as a command finds it: its configuration, its broker if one is running, its cluster document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cli.console import note
from pmgsync.errors import ConfigError, PmgsyncError, UnreachableError

if TYPE_CHECKING:
    import typer

    from broker.cluster.documents import Documents
    from pmgsync.config import NodeConfig
    from pmgsync.wire.link import BrokerLink

ANSWER_S = 5.0
HELLO_S = 2.0
SLOW_S = 30.0
"""For so long a broker that runs and does not answer is waited for."""
CHANGE_S = 10.0
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


def held_documents(config: NodeConfig) -> Documents:
    """Return the cluster document held, to be read.

    Raises:
        ConfigError: when it cannot be read.
    """
    from broker.cluster.documents import Documents
    from broker.cluster.state_directory import StateDirectory

    state = StateDirectory(config.state_dir)
    documents = Documents(state, state.keys())
    documents.load()
    return documents


def change_cluster(
    config: NodeConfig,
    request: Mapping[str, Any],
    *attachments: bytes,
    offline: Callable[[Documents], object],
    done: Callable[[Documents], bool],
) -> None:
    """Have the cluster document changed: by the broker, or here while none runs.

    Args:
        request, attachments: the operation of the local socket.
        offline: does the same without a broker.
        done: tells whether it is done, when the broker was lost before it answered, or could store the document and
            not take its place yet.

    Raises:
        PmgsyncError: when it was not done.
    """
    from broker.cluster.documents import offline_documents
    from broker.cluster.state_directory import StateDirectory

    def ask(hello_s: float) -> bool:
        try:
            with broker(config, timeout_s=hello_s) as link:
                link.request(request, *attachments, timeout_s=CHANGE_S)
        except PmgsyncError as error:
            if done(held_documents(config)):
                note(f"note: pmgsync-broker cannot take its place in the cluster yet: {error}")
                return True
            if not isinstance(error, UnreachableError):
                raise
            return False
        return True

    if ask(HELLO_S):
        return
    with ExitStack() as stack:
        try:
            documents = stack.enter_context(offline_documents(StateDirectory(config.state_dir)))
        except UnreachableError:
            # A broker holds the state directory: it runs, and was only slow to answer.
            if ask(SLOW_S):
                return
            raise
        offline(documents)
    note("note: pmgsync-broker is not running here; start it: systemctl start pmgsync-broker pmgsync-agent")
