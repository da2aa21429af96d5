"""Control messages as they cross a socket: a map with an `op`, and errors by name (PROTOCOL.md, sections 4 and 9).

They are packed by msgpack and checked by hand. msgspec was measured on one core and left out. Read and checked, a
heartbeat of three members takes 31 µs, with msgspec 14 (of twenty members 139 and 43); an ack of three 15 and 0.8; a
`frame` message 0.4 and 0.1. Heartbeats come once a second and acks ten times, so all of it is less than 0.1 % of a
core. msgspec would save some 40 lines and add 21 ms to the start of every process (msgpack: 3 ms). It is stricter
where we are lenient on purpose: an unknown `op` is answered, text that is not UTF-8 is escaped. Its errors on TOML say
"Expected `int` <= 65535 - at `$.ports.events`"; ours name file, value, what was expected and what was meant. It is
well kept (wheels for Python 3.11 to 3.14, x86 and ARM, musl too): the figures decide, not doubts about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from pmgsync.core.nesting import check_nesting
from pmgsync.errors import (
    MembershipError,
    PmgsyncError,
    ProtocolError,
    ResyncRequiredError,
    TokenRefusedError,
    TooManyAttemptsError,
    UnknownChainError,
    UnknownOperationError,
    UnreachableError,
)

Message = dict[str, Any]

ERRORS: Mapping[str, type[PmgsyncError]] = {
    kind.code: kind
    for kind in (
        PmgsyncError,
        ProtocolError,
        UnknownOperationError,
        UnknownChainError,
        MembershipError,
        TokenRefusedError,
        TooManyAttemptsError,
        UnreachableError,
        ResyncRequiredError,
    )
}
"""What an error's name on the wire becomes here."""


def pack(message: Mapping[str, Any]) -> bytes:
    """Return a control message's first part. Text may quote names from a database, which need not be UTF-8."""
    return msgpack.packb(message, use_bin_type=True, unicode_errors="backslashreplace")  # type: ignore[no-any-return]


def unpack(data: bytes) -> Message:
    """Return a control message's first part.

    Raises:
        ProtocolError: when it is not a map with a text `op`, or nested too deep.
    """
    try:
        message = msgpack.unpackb(data, raw=False, strict_map_key=False, max_ext_len=0)
    except Exception as error:  # msgpack raises ValueError and its own types
        raise ProtocolError(f"a control message is malformed ({error})") from error
    check_nesting(message)
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ProtocolError("a control message is not a map with an op")
    return message


def error_from(message: Mapping[str, Any]) -> PmgsyncError:
    """Return the exception that an `error` message stands for."""
    kind = ERRORS.get(str(message.get("error")), PmgsyncError)
    error = kind(str(message.get("message", "the peer gave no reason")), hint=str(message.get("hint", "")))
    if isinstance(recoverable := message.get("recoverable"), bool):
        error.recoverable = recoverable
    return error


def error_map(request: int, error: PmgsyncError) -> Message:
    """Return the `error` message that stands for an exception."""
    return {
        "op": "error",
        "id": request,
        "error": error.code,
        "message": error.message,
        "hint": error.hint,
        "recoverable": error.recoverable,
    }
