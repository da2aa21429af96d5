"""What the broker of a node has with and without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import zmq

from broker.cluster.attempts import Attempts
from broker.cluster.conf_file import ConfFile
from broker.cluster.documents import Documents
from broker.cluster.password import PamPassword
from broker.cluster.state_directory import StateDirectory
from broker.cluster.tokens import Tokens
from broker.leadership.splits import Splits
from broker.leadership.voter import Voter
from broker.net import sockets
from broker.net.keys import NodeKeys
from broker.net.loop import Loop, Socket
from broker.net.port import Port, Ports
from broker.net.refusals import Refusals
from broker.requests.sessions import Sessions
from pmgsync.config import NodeConfig


@dataclass(frozen=True)
class Resources:
    """Made once, when the broker starts."""

    config: NodeConfig
    state: StateDirectory
    keys: NodeKeys
    context: zmq.Context[Socket]
    loop: Loop
    ports: Ports
    sessions: Sessions
    tokens: Tokens
    attempts: Attempts
    passwords: PamPassword
    documents: Documents
    voter: Voter
    splits: Splits
    conf_file: ConfFile
    refusals: Refusals
    new_id: Callable[[], int]


def node_ports(context: zmq.Context[Socket], loop: Loop, config: NodeConfig, refusals: Refusals) -> Ports:
    """Return the ports of a node, none of them bound yet."""

    def port(kind: int, number: int, purpose: str, **limits: int) -> Port:
        return Port(context, loop, kind, config.address, number, purpose, refusals, **limits)

    return Ports(
        events=port(zmq.XPUB, config.events_port, "events"),
        control=port(
            zmq.ROUTER, config.control_port, "control", max_bytes=sockets.CONTROL_MAX_BYTES, hwm=sockets.CONTROL_HWM
        ),
        join=port(zmq.ROUTER, config.join_port, "join", hwm=sockets.JOIN_HWM),
        key=port(zmq.ROUTER, config.key_port, "key", hwm=sockets.JOIN_HWM),
    )
