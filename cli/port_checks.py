"""Whether this node can bind its ports, asked before anything depends on it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pmgsync.core.findings import Finding

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig


def port_findings(config: NodeConfig) -> list[Finding]:
    """Check this node's address and ports. A broker without a cluster binds none: a port in use is something else's."""
    return [Finding("ports", False, problem, remedy) for problem, remedy in _problems(config)]


def _problems(config: NodeConfig) -> Iterator[tuple[str, str]]:
    ports = {"events": config.events_port, "control": config.control_port, "join": config.join_port}
    try:
        family, _, _, _, resolved = socket.getaddrinfo(config.address, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        yield (
            f"the address {config.address!r} cannot be resolved ({error.strerror})",
            "set [node] address in node.toml to an address of this machine that the other nodes reach",
        )
        return
    for name, port in ports.items():
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As libzmq binds: a connection that has just ended does not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((resolved[0], port, *resolved[2:]))
                probe.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    yield (
                        f"the address {config.address} is not one of this machine's",
                        "set [node] address in node.toml to an address of this machine that the other nodes reach",
                    )
                    return
                yield (
                    f"the {name} port {port} on {config.address} cannot be bound ({error.strerror})",
                    f"free it, or set another one: [ports] {name} in node.toml",
                )
