"""What the events of libzmq's socket monitor say about a handshake that failed, at either end. Pure."""

from __future__ import annotations

import errno

import zmq

FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
NOT_A_MEMBER = 400
"""ZAP's status for a key that may not connect."""

NO_MEMBER = "its key is not a member's"
WRONG_SERVER_KEY = "it expects another key of this node than the one in use"
NO_CURVE = "it does not use CURVE: a plain ZeroMQ client, or another program"
MALFORMED = "its handshake is malformed: another program or version"
TOO_SLOW = "it did not finish the handshake in time"
GONE = "it went away during the handshake: a client without CURVE, a check of the port, or a node that was stopped"
"""A plain ZeroMQ client and a broker each see that the other is none of theirs; when the client is faster, this is all
that the broker sees."""
NO_ZMTP = "it does not speak ZMTP 3: another program, or an incompatible version of ZeroMQ"


def refusal(event: int, value: int) -> str:
    """Return why nothing came of a connection to this node.

    Args:
        event, value: of a failed handshake on a bound socket, but for those that ZAP denies: `broker.net.zap` tells of
            them.
    """
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if is_without_curve(event, value):
            return NO_CURVE
        return WRONG_SERVER_KEY if value == int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC) else MALFORMED
    return TOO_SLOW if value == errno.EAGAIN else GONE


def failure(event: int, value: int, where: str) -> str:
    """Return why a connection to `where` did not come about, as a sentence; the same events, seen by who connects."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        if value == NOT_A_MEMBER:
            return f"{where} refuses this node's key: it is not a member's there, or not yet"
        return f"{where} refuses this node's key with status {value}"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if is_without_curve(event, value):
            return f"what listens at {where} does not use CURVE: it is another program, or not set up for a cluster"
        if value == int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC):
            return f"{where} proves another key than the one in the cluster document"
        return f"the handshake with {where} is malformed: another program or version may listen there"
    if value == errno.EAGAIN:
        return f"{where} takes the connection and does not answer"
    return f"{where} ended the handshake without a word: its key may not be the one in the cluster document"


def no_zmtp(where: str) -> str:
    """Return the sentence for a connection that ended before there was anything that could be called a handshake."""
    return f"what listens at {where} does not speak ZMTP 3: another program, or an incompatible version of ZeroMQ"


def is_without_curve(event: int, value: int) -> bool:
    """Return True for the failed handshake of two of whom one does not use CURVE."""
    return event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
