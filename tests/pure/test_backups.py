"""The format of backups: what goes in comes out, and whatever is missing, moved or changed shows."""

from __future__ import annotations

import io
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmgsync.core.backups import About, Contents, Record, pack_records, unpack_records
from pmgsync.core.manifests import Entry, pack_changes
from pmgsync.core.sealing import CHUNK_BYTES, MAGIC, SALT_BYTES, Cost, is_encrypted, open_chunks, seal_chunks
from pmgsync.errors import DamagedFileError, PassphraseError, PmgsyncError, ProtocolError

CHEAP = Cost(n=16, r=1, p=1)
SALT = bytes(range(SALT_BYTES))
WORD = b"correct horse"
PASSPHRASES = st.sampled_from([None, WORD])


def sealed(pieces: Iterable[bytes], passphrase: bytes | None, salt: bytes = SALT) -> bytes:
    return b"".join(seal_chunks(pieces, None if passphrase is None else (passphrase, salt), CHEAP))


def opened(file: bytes, passphrase: bytes | None = WORD) -> bytes:
    return b"".join(open_chunks(io.BytesIO(file).read, lambda: passphrase or b""))


def chunks(file: bytes) -> tuple[bytes, list[bytes]]:
    """Return a file's head, and its chunks with their lengths."""
    stream = io.BytesIO(file)
    head = stream.read(len(MAGIC) + 1)
    size = stream.read(4)
    head += size + stream.read(int.from_bytes(size, "big"))
    found = []
    while length := stream.read(4):
        found.append(length + stream.read(int.from_bytes(length, "big") & 0x7FFF_FFFF))
    return head, found


@given(st.lists(st.binary(max_size=2000)), PASSPHRASES)
def test_what_is_sealed_is_opened(pieces: list[bytes], passphrase: bytes | None) -> None:
    file = sealed(pieces, passphrase)
    assert opened(file) == b"".join(pieces)
    assert is_encrypted(io.BytesIO(file).read) == (passphrase is not None)


@pytest.mark.parametrize("passphrase", [None, WORD])
@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_sizes_around_a_chunk(size: int, passphrase: bytes | None) -> None:
    data = bytes(size)
    assert opened(sealed([data[:7], data[7:]], passphrase)) == data


@settings(max_examples=300)
@given(st.data(), PASSPHRASES)
def test_a_change_of_any_byte_shows(data: st.DataObject, passphrase: bytes | None) -> None:
    file = bytearray(sealed([b"x" * 300], passphrase))
    at = data.draw(st.integers(0, len(file) - 1))
    file[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PmgsyncError):
        opened(bytes(file))


@given(st.data(), PASSPHRASES)
def test_a_file_that_is_cut_off_or_goes_on_shows(data: st.DataObject, passphrase: bytes | None) -> None:
    file = sealed([b"x" * 300], passphrase)
    with pytest.raises((DamagedFileError, ProtocolError)):
        opened(file[: data.draw(st.integers(0, len(file) - 1))])
    with pytest.raises(DamagedFileError, match="goes on behind its end"):
        opened(file + data.draw(st.binary(min_size=1, max_size=100)))


@settings(max_examples=30)
@given(st.data(), PASSPHRASES)
def test_chunks_that_are_left_out_moved_or_doubled_show(data: st.DataObject, passphrase: bytes | None) -> None:
    head, parts = chunks(sealed([bytes([n]) * CHUNK_BYTES for n in range(4)], passphrase))
    wrong = data.draw(
        st.lists(st.sampled_from(range(len(parts))), max_size=6).filter(lambda order: order != [0, 1, 2, 3])
    )
    with pytest.raises(DamagedFileError):
        opened(head + b"".join(parts[n] for n in wrong))


def test_chunks_of_another_file_show() -> None:
    content = [bytes(CHUNK_BYTES), b"end"]
    head, parts = chunks(sealed(content, WORD))
    _, others = chunks(sealed(content, WORD, salt=bytes(SALT_BYTES)))
    assert opened(head + parts[0] + parts[1]) == b"".join(content)
    with pytest.raises(DamagedFileError, match="chunk 2"):
        opened(head + parts[0] + others[1])


def test_another_passphrase_is_told_from_damage() -> None:
    file = sealed([b"secret content"], WORD)
    assert b"secret content" not in file
    assert WORD not in file
    with pytest.raises(PassphraseError):
        opened(file, b"battery staple")


def test_a_file_cannot_make_the_reader_spend_memory() -> None:
    dear = Cost(n=1 << 30, r=8, p=1)
    assert not dear.bearable
    assert Cost().bearable
    head, parts = chunks(sealed([b""], WORD))
    packed = head.replace(b"\xa1n\x10", b"\xa1n\xce\x40\x00\x00\x00")
    length = len(MAGIC) + 1
    grown = len(packed) - length - 4
    with pytest.raises(ProtocolError, match="not known here"):
        opened(packed[:length] + grown.to_bytes(4, "big") + packed[length + 4 :] + parts[0])


@pytest.mark.parametrize("data", [b"", b"PGDMP", MAGIC[:-1], b"\0" * 100])
def test_any_other_file_is_no_backup(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a backup"):
        opened(data)


def test_a_later_version_is_named() -> None:
    with pytest.raises(ProtocolError, match="version 9"):
        opened(MAGIC + b"\x09" + bytes(20))


# -- records ----------------------------------------------------------------------------------------------------------

ABOUT = About(1, "pmg1", "pmg", "d" * 64, False, b"Proxmox_ruledb", "SQL_ASCII", 150004, "0.1.0")
FILE = Entry("f", 0o640, "root", "www-data", 3, 1, b"\1" * 32)
DIRECTORY = Entry("d", 0o755, "root", "root")


def packed_entry(name: bytes, entry: Entry) -> Record:
    return {"kind": "file"}, pack_changes([(name, entry)])


def whole() -> list[Record]:
    records: list[Record] = [
        (ABOUT.to_map(), None),
        ({"kind": "table", "schema": b"public", "table": b"rule\xff", "columns": [b"id", b"name"]}, None),
        ({"kind": "rows"}, b"1\tx\n2\t\xff"),
        ({"kind": "rows"}, b"\xfe\n"),
        ({"kind": "table-end", "rows": 2}, None),
        ({"kind": "table", "schema": b"public", "table": b"empty", "columns": []}, None),
        ({"kind": "table-end", "rows": 0}, None),
        ({"kind": "sequences", "values": [[b"public", b"rule_id_seq", 7, True]]}, None),
        ({"kind": "tree", "root": "/etc/pmg", "present": True}, None),
        packed_entry(b"templates", DIRECTORY),
        packed_entry(b"templates/\xff", FILE),
        ({"kind": "content"}, b"ab"),
        ({"kind": "content"}, b"c"),
        packed_entry(b"empty", FILE._replace(size=0)),
        ({"kind": "tree-end", "entries": 3}, None),
        ({"kind": "tree", "root": "/etc/none", "present": False}, None),
        ({"kind": "tree-end", "entries": 0}, None),
    ]
    contents = Contents()
    for record in records:
        contents.take(*record)
    return [*records, (contents.end(), None)]


def taken(records: Iterable[Record]) -> Contents:
    contents = Contents()
    for record, attachment in records:
        contents.take(record, attachment)
    return contents


def test_the_contents_are_counted() -> None:
    contents = taken(whole())
    assert contents.complete
    assert contents.about == ABOUT
    assert (contents.rows, contents.files, contents.size) == (2, 2, 12)
    assert [(table.label, table.rows) for table in contents.tables] == [("public.rule\\xff", 2), ("public.empty", 0)]
    assert [(tree.root, tree.present, tree.directories) for tree in contents.trees] == [
        ("/etc/pmg", True, 1),
        ("/etc/none", False, 0),
    ]
    assert contents.sequences[0].value == 7


@given(st.data())
def test_records_come_back_however_the_bytes_are_cut(data: st.DataObject) -> None:
    stream = b"".join(pack_records(whole()))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert list(unpack_records(pieces)) == whole()


@given(st.data())
def test_a_record_that_is_left_out_doubled_or_moved_shows(data: st.DataObject) -> None:
    records = whole()
    kind, at = data.draw(st.sampled_from(["drop", "double", "move"])), data.draw(st.integers(0, len(records) - 1))
    if kind == "drop":
        records.pop(at)
    elif kind == "double":
        records.insert(at, records[at])
    else:
        to = data.draw(st.integers(0, len(records) - 1).filter(lambda to: to != at))
        records.insert(to, records.pop(at))
        # Two tables or trees may change places; that is another backup, and a whole one.
    try:
        contents = taken(records)
    except ProtocolError:
        return
    assert not contents.complete or (contents.rows, contents.files, contents.size) == (2, 2, 12)


@given(st.integers(0, 400))
def test_a_stream_of_records_that_is_cut_off_is_not_complete(left: int) -> None:
    stream = b"".join(pack_records(whole()))
    cut = stream[: max(0, len(stream) - 1 - left)]
    try:
        assert not taken(unpack_records([cut])).complete
    except DamagedFileError as error:
        assert "middle of a record" in error.message


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "backup"},
        ABOUT.to_map() | {"made_us": "1"},
        {"kind": "table", "schema": b"public", "table": b"t", "columns": []},
        {},
    ],
)
def test_a_bad_beginning_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        Contents().take(record, None)


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_end_in_a_sentence(data: bytes) -> None:
    try:
        taken(unpack_records([data]))
    except PmgsyncError as error:
        assert error.message.startswith("the backup")


def test_names_that_leave_the_tree_are_refused() -> None:
    records = whole()[:9]
    records.append(({"kind": "file"}, pack_changes([(b"../passwd", FILE)])))
    with pytest.raises(ProtocolError):
        taken(records)
