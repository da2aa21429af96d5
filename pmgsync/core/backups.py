"""What a backup says, record by record: what it is of, tables with their rows, sequences, trees of files. Pure.

Records are in this order, and each is a map with a `kind` and at most one attachment of bytes:

    backup      what it is of, see `About`
    table       schema, table, columns (bytes); then any number of
    rows          COPY text format; a line may go on in the next record
    table-end     rows: their number
    sequences   values: a list of [schema, name, value, called]
    tree        root: as the profile names it; present: False when there was none; then
    file          one entry as `pmgsync.core.manifests.pack_changes` writes it; of a file then any number of
    content         its bytes
    tree-end      entries: their number
    end         rows, files, bytes: of all
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from pmgsync.core.manifests import Entry, unpack_changes
from pmgsync.errors import DamagedFileError, ProtocolError

Record = tuple[dict[str, Any], bytes | None]

MAX_ATTACHMENT = 1 << 20
MAX_RECORD = MAX_ATTACHMENT + (4 << 20)
"""A table's columns or the list of all sequences may be long."""


@dataclass(frozen=True, slots=True)
class About:
    """What a backup is of.

    Attributes:
        made_us: µs since 1970, when its snapshot was taken.
        node: the node's name, for people.
        profile, profile_digest: of the node's profile.
        statistics: True when the tables are in it that the profile calls statistics.
        database: its name.
        encoding: of the database.
        server: PostgreSQL's version, as `server_version_num`.
        software: of pmgsync.
    """

    made_us: int
    node: str
    profile: str
    profile_digest: str
    statistics: bool
    database: bytes
    encoding: str
    server: int
    software: str

    def to_map(self) -> dict[str, Any]:
        """Return the record."""
        return {"kind": "backup"} | {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_map(cls, values: Mapping[str, Any]) -> About:
        """Return what a record says.

        Raises:
            ProtocolError: when it does not.
        """
        types = {
            "made_us": int, "node": str, "profile": str, "profile_digest": str, "statistics": bool, "database": bytes,
            "encoding": str, "server": int, "software": str,
        }  # fmt: skip
        if any(type(values.get(name)) is not kind for name, kind in types.items()):
            raise ProtocolError(f"the backup begins with {values!r:.200}")
        return cls(**{name: values[name] for name in types})


@dataclass(slots=True)
class TableContent:
    """A table in a backup: how many rows, and their size in COPY text format."""

    schema: bytes
    name: bytes
    columns: list[bytes]
    rows: int = 0
    size: int = 0

    @property
    def label(self) -> str:
        """Its name for people."""
        return (self.schema + b"." + self.name).decode(errors="backslashreplace")


@dataclass(slots=True)
class TreeContent:
    """A tree of files in a backup; `present` is False when there was no such directory."""

    root: str
    present: bool
    files: int = 0
    directories: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class SequenceValue:
    """A sequence's value, and whether it was handed out."""

    schema: bytes
    name: bytes
    value: int
    called: bool


@dataclass
class Contents:
    """Takes every record of a backup in turn; says what is in it, and that nothing stands where it cannot.

    Attributes:
        about: None before the first record.
        complete: True behind the last record.
    """

    about: About | None = None
    tables: list[TableContent] = field(default_factory=list)
    sequences: list[SequenceValue] = field(default_factory=list)
    trees: list[TreeContent] = field(default_factory=list)
    complete: bool = False
    _open: str = "begin"
    """`begin`, `tables`, `rows` (in a table), `trees`, `files` (in a tree), `content` (in a file)."""
    _left: int = 0
    """Bytes of the open file that are still to come."""

    @property
    def rows(self) -> int:
        """Rows of all tables."""
        return sum(table.rows for table in self.tables)

    @property
    def files(self) -> int:
        """Files of all trees."""
        return sum(tree.files for tree in self.trees)

    @property
    def size(self) -> int:
        """Bytes of all rows and files."""
        return sum(table.size for table in self.tables) + sum(tree.size for tree in self.trees)

    def take(self, record: Mapping[str, Any], attachment: bytes | None) -> None:
        """Take the next record.

        Raises:
            ProtocolError: when it is malformed, or cannot stand here.
        """
        data = attachment or b""
        match self._open, record:
            case "begin", {"kind": "backup"}:
                self.about = About.from_map(record)
                self._open = "tables"
            case "tables", {"kind": "table", "schema": bytes(schema), "table": bytes(name), "columns": [*columns]} if (
                all(type(column) is bytes for column in columns)
            ):
                if any((table.schema, table.name) == (schema, name) for table in self.tables):
                    raise ProtocolError("the backup has a table twice")
                self.tables.append(TableContent(schema, name, columns))
                self._open = "rows"
            case "rows", {"kind": "rows"}:
                # In text format a line end is the end of a row: within a value it is written as \n.
                self.tables[-1].rows += data.count(b"\n")
                self.tables[-1].size += len(data)
            case "rows", {"kind": "table-end", "rows": int(rows)} if rows == self.tables[-1].rows:
                self._open = "tables"
            case "tables", {"kind": "sequences", "values": [*values]}:
                self.sequences = list(map(_sequence, values))
                self._open = "trees"
            case "trees", {"kind": "tree", "root": str(root), "present": bool(present)}:
                self.trees.append(TreeContent(root, present))
                self._open = "files"
            case "files", {"kind": "file"}:
                self._take_entry(file_entry(data))
            case "content", {"kind": "content"} if 0 < len(data) <= self._left:
                self._left -= len(data)
                if not self._left:
                    self._open = "files"
            case "files", {"kind": "tree-end", "entries": int(entries)} if entries == self._entries:
                self._open = "trees"
            case "trees", {"kind": "end", "rows": self.rows, "files": self.files, "bytes": self.size}:
                self._open, self.complete = "end", True
            case _:
                raise ProtocolError(f"the backup has a record {record.get('kind')!r:.40} where it cannot stand")

    def end(self) -> dict[str, Any]:
        """Return the last record of what was taken."""
        return {"kind": "end", "rows": self.rows, "files": self.files, "bytes": self.size}

    @property
    def _entries(self) -> int:
        return self.trees[-1].files + self.trees[-1].directories

    def _take_entry(self, named: tuple[bytes, Entry]) -> None:
        tree, (_, entry) = self.trees[-1], named
        if entry.kind == "d":
            tree.directories += 1
            return
        tree.files += 1
        tree.size += entry.size
        self._left = entry.size
        self._open = "content" if entry.size else "files"


def file_entry(attachment: bytes) -> tuple[bytes, Entry]:
    """Return name and entry of a record `file`; the name cannot leave the tree.

    Raises:
        ProtocolError: when it is anything else.
    """
    match unpack_changes(attachment):
        case [(name, Entry() as entry)]:
            return name, entry
    raise ProtocolError("the backup has a record 'file' that names no file")


def pack_records(records: Iterable[Record]) -> Iterator[bytes]:
    """Yield records as bytes, to be joined."""
    for record, attachment in records:
        yield msgpack.packb([record, attachment], use_bin_type=True)


def unpack_records(pieces: Iterable[bytes]) -> Iterator[Record]:
    """Yield the records of bytes, cut anywhere; nothing but one record is held in memory.

    Raises:
        ProtocolError: when the bytes are anything else.
    """
    unpacker = msgpack.Unpacker(
        raw=False, max_buffer_size=MAX_RECORD, max_bin_len=MAX_RECORD, max_str_len=MAX_RECORD, max_ext_len=0
    )
    fed = used = 0
    for piece in pieces:
        fed += len(piece)
        try:
            unpacker.feed(piece)
            for value in unpacker:
                used = unpacker.tell()
                match value:
                    case [dict() as record, (bytes() | None) as attachment] if len(attachment or b"") <= MAX_ATTACHMENT:
                        yield record, attachment
                    case _:
                        raise ProtocolError(f"the backup has a record {value!r:.100}")
        except ProtocolError:
            raise
        except Exception as error:  # msgpack raises ValueError and its own types
            raise ProtocolError(f"the backup has a malformed record ({error})") from error
    if used != fed:
        raise DamagedFileError("the backup ends in the middle of a record", hint="take another copy of it")


def _sequence(value: object) -> SequenceValue:
    match value:
        case [bytes(schema), bytes(name), int(number), bool(called)]:
            return SequenceValue(schema, name, number, called)
    raise ProtocolError(f"the backup has a sequence {value!r:.100}")
