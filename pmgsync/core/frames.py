"""Frames: the unit in which a chain travels and is stored, a header and a body of pgoutput messages. Pure, no I/O."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgpack

from pmgsync.core.positions import LAST, MAX_LSN, Position
from pmgsync.errors import FrameDamagedError, ProtocolError, ResyncRequiredError

VERSION = 1
MAX_HEADER = 512
"""Bytes."""
MAX_BODY = (1 << 30) + (64 << 10)
"""Bytes; one PostgreSQL field may be 1 GiB."""

_FIELDS = 13
_CHECKSUM_BYTES = 5
_UINT32_MARK = 0xCE
_INT = {int}


@dataclass(frozen=True, slots=True)
class Header:
    """What a broker needs to know of a frame; field meanings are in PROTOCOL.md, section 2."""

    cluster: bytes
    epoch: int
    origin: int
    incarnation: int
    prev: Position
    here: Position
    commit_time: int
    attempt: int
    changes: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A header with the bytes it was read from, and the body it belongs to."""

    header: Header
    header_bytes: bytes
    body: bytes

    @property
    def size(self) -> int:
        """Bytes that the frame takes from a credit."""
        return len(self.header_bytes) + len(self.body)

    @property
    def prev(self) -> Position:
        return self.header.prev

    @property
    def here(self) -> Position:
        return self.header.here


def pack_body(messages: Sequence[bytes]) -> bytes:
    """Return the body that holds these pgoutput messages."""
    return msgpack.packb(messages, use_bin_type=True)  # type: ignore[no-any-return]


def unpack_body(body: bytes) -> list[bytes]:
    """Return the pgoutput messages of a body.

    Raises:
        ProtocolError: when it is not an array of bin.
    """
    try:
        messages = msgpack.unpackb(
            body, use_list=True, raw=False, max_bin_len=MAX_BODY, max_array_len=len(body), max_ext_len=0, max_map_len=0
        )
    except Exception as error:  # msgpack raises ValueError, its own types and, for depth, StackError
        raise ProtocolError(f"a frame's body is not an array of messages ({error})") from error
    if not isinstance(messages, list) or not set(map(type, messages)) <= {bytes}:
        raise ProtocolError("a frame's body is not an array of bin")
    return messages


def make_frame(header: Header, messages: Sequence[bytes]) -> Frame:
    """Return the frame of a header and its messages, with the checksum set."""
    body = pack_body(messages)
    fields = (
        VERSION,
        header.cluster,
        header.epoch,
        header.origin,
        header.incarnation,
        *header.prev,
        *header.here,
        header.commit_time,
        header.attempt,
        header.changes,
    )
    # An array of 13 is one byte, 0x9d, before its fields; the last, the checksum, is appended by hand because it always
    # takes five bytes.
    start = bytes([0x90 | _FIELDS]) + msgpack.packb(fields, use_bin_type=True)[1:]
    checksum = zlib.crc32(body, zlib.crc32(start))
    return Frame(header, start + bytes([_UINT32_MARK]) + checksum.to_bytes(4, "big"), body)


def read_header(header_bytes: bytes) -> Header:
    """Return what a header says, without looking at the body.

    Raises:
        ProtocolError: when it is malformed, too long, or of a version that is not known here.
    """
    if not _CHECKSUM_BYTES < len(header_bytes) <= MAX_HEADER:
        raise ProtocolError(f"a frame's header has {len(header_bytes)} bytes, expected at most {MAX_HEADER}")
    try:
        fields = msgpack.unpackb(header_bytes, use_list=True, raw=False, max_ext_len=0, max_map_len=0)
    except Exception as error:  # as in unpack_body
        raise ProtocolError(f"a frame's header is not MessagePack ({error})") from error
    if not isinstance(fields, list) or not fields or type(fields[0]) is not int:
        raise ProtocolError("a frame's header is not an array that begins with a version")
    if fields[0] != VERSION:
        raise ProtocolError(
            f"a frame has version {fields[0]}, this node reads version {VERSION}",
            hint="upgrade the node that runs the older pmgsync",
        )
    if len(fields) != _FIELDS or header_bytes[-_CHECKSUM_BYTES] != _UINT32_MARK:
        raise ProtocolError(f"a frame's header has {len(fields)} fields, expected {_FIELDS} and a five-byte checksum")
    _, cluster, epoch, origin, incarnation, *rest = fields
    if type(cluster) is not bytes or len(cluster) != 16:
        raise ProtocolError("a frame's cluster id is not 16 bytes")
    numbers = fields[2:]
    if set(map(type, numbers)) != _INT or min(numbers) < 0 or max(numbers) > MAX_LSN:
        raise ProtocolError("a frame's header holds something other than an unsigned integer")
    prev_lsn, prev_part, here_lsn, here_part, commit_time, attempt, changes, _ = rest
    prev, here = Position.of(prev_lsn, prev_part), Position.of(here_lsn, here_part)
    if prev >= here:
        raise ProtocolError(f"a frame ends at {here}, which is not after {prev}, the position it follows")
    if not prev.complete and prev.lsn != here.lsn:
        raise ProtocolError(f"a frame that ends at {here} follows {prev}, in the middle of another transaction")
    return Header(cluster, epoch, origin, incarnation, prev, here, commit_time, attempt, changes)


def read_frame(header_bytes: bytes, body: bytes) -> Frame:
    """Return a frame whose checksum holds.

    Raises:
        ProtocolError: as `read_header`.
        FrameDamagedError: when the checksum does not match.
    """
    header = read_header(header_bytes)
    if len(body) > MAX_BODY:
        raise ProtocolError(f"a frame's body has {len(body)} bytes, expected at most {MAX_BODY}")
    expected = int.from_bytes(header_bytes[-4:], "big")
    if zlib.crc32(body, zlib.crc32(header_bytes[:-_CHECKSUM_BYTES])) != expected:
        raise FrameDamagedError(f"the frame of origin {header.origin} that ends at {header.here} is damaged")
    return Frame(header, header_bytes, body)


def read_frames(parts: Sequence[bytes]) -> Iterator[Frame]:
    """Yield the frames of a message, header and body in turn; each is read when it is asked for.

    Raises:
        ProtocolError: as `read_frame`, or when there is none, or a body is missing.
    """
    if not parts or len(parts) % 2:
        raise ProtocolError(f"a message of {len(parts)} parts does not hold frames, each a header and a body")
    return map(read_frame, parts[::2], parts[1::2])


def is_part(header: Header) -> bool:
    """True when the frame is one of several parts of a transaction."""
    return header.here.part != LAST or not header.prev.complete


def with_parts(frames: Iterable[Frame], most: int) -> Iterator[list[Frame]]:
    """Yield each frame by itself, but the parts of a transaction together when all are there and follow each other.

    Args:
        most: changes that parts may have which are yielded together.
    """
    parts: list[Frame] = []
    for frame in frames:
        last = parts[-1].header if parts else None
        if last is not None and (
            (last.here, last.attempt, last.epoch, last.incarnation, last.origin)
            != (frame.prev, frame.header.attempt, frame.header.epoch, frame.header.incarnation, frame.header.origin)
        ):  # fmt: skip
            yield from ([part] for part in parts)
            parts = []
        if not parts and (frame.here.complete or not frame.prev.complete):
            yield [frame]
            continue
        parts.append(frame)
        if frame.here.complete and sum(part.header.changes for part in parts) <= most:
            yield parts
            parts = []
        elif frame.here.complete:
            yield from ([part] for part in parts)
            parts = []
    yield from ([part] for part in parts)


def messages_of(frames: Sequence[Frame]) -> list[bytes]:
    """Return the pgoutput messages of a frame, or of all parts of a transaction.

    Raises:
        ProtocolError: when a body cannot be read, or the parts are not those of one transaction.
    """
    messages = [message for frame in frames for message in unpack_body(frame.body)]
    if len(frames) > 1:
        kinds = b"".join([message[:1] for message in messages])
        if kinds.count(b"B") != 1 or kinds.count(b"C") != 1 or not kinds.endswith(b"C"):
            raise ProtocolError("the parts of a transaction hold something else, or no Commit at their end")
    return messages


def check_chain(frame: Frame, origin: int, incarnation: int) -> None:
    """Check that a frame is of the chain that is applied.

    Raises:
        ProtocolError: when it is of another origin.
        ResyncRequiredError: when the chain was begun anew.
    """
    header = frame.header
    if header.origin != origin:
        raise ProtocolError(f"a frame of origin {header.origin} came to the applier of origin {origin}")
    if header.incarnation != incarnation:
        raise ResyncRequiredError(
            f"the chain of origin {origin} was begun anew, this database has its incarnation {incarnation:016x}, the "
            f"frame is of {header.incarnation:016x}",
            hint="nothing need be done: a snapshot is taken",
        )
