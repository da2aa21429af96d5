"""Changes of the schema as they travel: what a message says, and which statement of a string it is about. Pure.

Event triggers write each change into the stream as a logical message, with the statement's text. Deparsing the catalog
would be surer of the text, but is a program of its own for every kind of object; the text covers everything that the
server accepts. For what PL/pgSQL executes the call stack has the text, and for a string of one statement it is exact.

A string that a client sends may hold many statements, and an event trigger is told the string, not its place in it.
But it fires once for each statement that changes the schema, in order, and knows its command tag; so the statement is
the one where the tags that came so far fit.

The result is compared: the message has the columns of every table touched, as they became. So a wrong choice, a default
that came out differently (`now()`) and a failure all show, and the table is stale and fetched; so is a table whose rows
were rewritten. A failure never stops the chain: the rows say better than the statement whether anything is wrong.
CONCURRENTLY is left out, because it cannot be done in the transaction of the rows around it. A transaction with such
a change is applied in steps, like a large one: what follows is planned only when the change is done.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pmgsync.errors import ProtocolError

PREFIX = b"pmgsync.schema"
"""Of the logical message that carries a change of the schema."""
FETCH_PREFIX = b"pmgsync.table"
"""Of the logical message that names tables whose content is not in the stream."""
SETTINGS = frozenset(
    {"datestyle", "intervalstyle", "timezone", "lc_monetary", "xmloption", "standard_conforming_strings"}
)
"""Settings that decide what a statement's text means."""


class TableShape(NamedTuple):
    """A table after the change.

    Attributes:
        oid: on the origin.
        shape: what of it must be the same, as pmgsync.shape tells it.
        rewritten: its rows were written anew, and may differ from what they become elsewhere.
    """

    schema: bytes
    name: bytes
    oid: int
    shape: bytes
    rewritten: bool


class SchemaChange(NamedTuple):
    """One statement that changed the schema of the origin.

    Attributes:
        tag: the command tag, such as CREATE TABLE.
        role: who executed it.
        path: the schemas in which names were looked for.
        settings: name and value of what decides its meaning.
        statement: its text; b"" when it is not known.
        objects: what was made or changed, for people.
        dropped: schema and name of the tables that are gone.
        tables: the tables that were changed, as they are now.
    """

    tag: str
    role: bytes
    path: tuple[bytes, ...]
    settings: tuple[tuple[str, bytes], ...]
    statement: bytes
    objects: tuple[str, ...]
    dropped: tuple[tuple[bytes, bytes], ...]
    tables: tuple[TableShape, ...]

    @property
    def label(self) -> str:
        """The change in a few words."""
        names = ", ".join(self.objects[:3]) + (" and more" if len(self.objects) > 3 else "")
        return f"{self.tag} ({names})" if names else self.tag


def unpack_change(content: bytes) -> SchemaChange:
    """Return what a message says. Keys that are not known belong to a later version and are ignored.

    Raises:
        ProtocolError: when it is not what the event trigger writes.
    """
    try:
        found = _load(content)
        caller = found["caller"]
        settings = tuple((str(name), _bytes(value)) for name, value in caller["settings"].items() if name in SETTINGS)
        dropped = list(found["dropped"])
        tables = tuple(
            TableShape(
                *(_name(table["schema"]), _name(table["name"]), int(table["oid"])),
                *(_bytes(table["shape"]), bool(table["rewritten"])),
            )
            for table in found["tables"]
        )
        if found["statement"] is not None:
            statement = only(found["statement"], found["tag"]) or ""
        else:
            statement = pick(found["query"] or "", found["tags"] or []) or ""
        return SchemaChange(
            tag=str(found["tag"]),
            role=_name(caller["role"]),
            path=tuple(_name(schema) for schema in caller["path"] if not schema.startswith("pg_temp")),
            settings=settings,
            statement=_bytes(without_concurrently(statement)),
            objects=tuple(_label(text) for text in found["objects"])
            or tuple(_label(f"{gone['type']} {gone['identity']}") for gone in dropped),
            dropped=tuple((_name(gone["schema"]), _name(gone["name"])) for gone in dropped if gone["type"] == "table"),
            tables=tables,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"a message of a schema change cannot be read ({error})") from error


class MissingContent(NamedTuple):
    """A table whose content is not in the stream."""

    schema: bytes
    name: bytes
    oid: int


def unpack_missing(content: bytes) -> list[MissingContent]:
    """Return the tables that a message names.

    Raises:
        ProtocolError: when it is not what the event trigger writes.
    """
    try:
        return [
            MissingContent(_name(table["schema"]), _name(table["name"]), int(table["oid"]))
            for table in _load(content)["tables"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"a message of tables to be fetched cannot be read ({error})") from error


def _load(content: bytes) -> dict[str, Any]:
    found = json.loads(content.decode(errors="surrogateescape"))
    if not isinstance(found, dict):
        raise TypeError("no object")
    return found


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _name(text: str) -> bytes:
    name = _bytes(text)
    if not 0 < len(name) < 1024 or b"\0" in name:
        raise ValueError("a name has no length that a name has")
    return name


def _label(text: str) -> str:
    return _bytes(text).decode(errors="backslashreplace")


# -- statements of a string --------------------------------------------------------------------------------------------

# What one token is; the order counts. An apostrophe ends a string unless it is doubled, or escaped in an E'' string.
_TOKEN = re.compile(
    r"""
    (?P<space> \s+ | --[^\n]* )
  | (?P<comment> /\* )
  | (?P<string> [eE]'(?:[^'\\]|\\.|'')*(?:'|\Z)
      | (?:[bBxXnN]|[uU]&)?'(?:[^']|'')*(?:'|\Z)
      | (?:[uU]&)?"(?:[^"]|"")*(?:"|\Z) )
  | (?P<dollar> \$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z_0-9\x80-\U0010ffff]*)?\$ )
  | (?P<word> [A-Za-z_\x80-\U0010ffff][A-Za-z_0-9$\x80-\U0010ffff]* )
  | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)


class _Token(NamedTuple):
    kind: str
    start: int
    end: int
    text: str


def _tokens(text: str) -> Iterator[_Token]:
    """Yield everything that is neither space nor comment."""
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match is not None and match.lastgroup is not None
        kind, start, at = match.lastgroup, at, match.end()
        if kind == "comment":
            at = _comment_end(text, start)
            continue
        if kind == "space":
            continue
        if kind == "dollar":
            end = text.find(match[0], at)
            at = len(text) if end < 0 else end + len(match[0])
            kind = "string"
        yield _Token(kind, start, at, text[start:at])


def _comment_end(text: str, start: int) -> int:
    """Return where a comment ends; comments nest."""
    depth = 0
    for match in re.compile(r"/\*|\*/").finditer(text, start):
        depth += 1 if match[0] == "/*" else -1
        if depth == 0:
            return match.end()
    return len(text)


class Statement(NamedTuple):
    """A statement of a string: its text, and its words in capitals, outside of strings and quoted names."""

    text: str
    words: tuple[str, ...]


def split(text: str) -> list[Statement]:
    """Return the statements of a string. A semicolon inside parentheses or a body BEGIN ATOMIC ... END ends none."""
    found = []
    words: list[str] = []
    start = end = -1
    depth = body = 0
    for token in _tokens(text):
        if token.text == ";" and depth == 0 and body == 0:
            if start >= 0:
                found.append(Statement(text[start:end], tuple(words)))
            start, words = -1, []
            continue
        if start < 0:
            start = token.start
        end = token.end
        if token.kind == "other":
            depth = max(0, depth + (token.text == "(") - (token.text == ")"))
        elif token.kind == "word" and depth == 0:
            word = token.text.upper()
            if words[:1] == ["CREATE"] and {"FUNCTION", "PROCEDURE"} & set(words[:4]):
                if word == "ATOMIC" and words[-1:] == ["BEGIN"]:
                    body = 1
                elif body and word == "CASE":
                    body += 1
                elif body and word == "END":
                    body -= 1
            words.append(word)
    if start >= 0:
        found.append(Statement(text[start:end], tuple(words)))
    return found


_GLOBAL = {"DATABASE", "ROLE", "USER", "GROUP", "TABLESPACE", "SYSTEM", "PARAMETER"}
_NEAR = 8
"""Words at a statement's start among which those of its tag are."""


def could_be(statement: Statement, tag: str) -> bool:
    """Return True when an event trigger may be told this tag for a statement."""
    words = statement.words
    if not words:
        return False
    match tag:
        case "SELECT INTO":
            return words[0] in {"SELECT", "WITH"} and "INTO" in words
        case "GRANT" | "REVOKE":
            # Without ON it is about roles, which belong to no database.
            on = words.index("ON") if "ON" in words else 0
            return words[0] == tag and on > 0 and not _GLOBAL & set(words[on + 1 : on + 2])
        case "COMMENT" | "SECURITY LABEL":
            rest = words[2 : len(words)]
            return tag.startswith(words[0]) and not (_GLOBAL - {"USER", "GROUP"}) & set(rest[:1])
    wanted = tag.split()
    if words[0] != wanted[0]:
        return False
    if words[1:2] and words[1] in _GLOBAL and words[1:3] != ("USER", "MAPPING"):
        return False
    # The others come in this order, with OR REPLACE, UNIQUE, UNLOGGED and the like between them; AS comes late.
    near = iter(words[1:] if tag == "CREATE TABLE AS" else words[1:_NEAR])
    return all(word in near for word in wanted[1:])


def pick(query: str, tags: Sequence[str]) -> str | None:
    """Return the statement of a string that the newest of some tags belongs to, None when that cannot be told.

    Args:
        query: what the client sent.
        tags: of the statements of it that have fired an event trigger so far, in order.
    """
    statements = split(query)
    if len(statements) == 1:
        return statements[0].text
    left = iter(statements)
    chosen = None
    for tag in tags:
        chosen = next((statement for statement in left if could_be(statement, tag)), None)
        if chosen is None:
            return None
    return None if chosen is None else chosen.text


def only(text: str, tag: str) -> str | None:
    """Return the statement of a text that a tag belongs to, None when several could be it.

    PL/pgSQL executes strings of several statements, too, and how many of them have come is not known there.
    """
    statements = split(text)
    if len(statements) > 1:
        statements = [statement for statement in statements if could_be(statement, tag)]
    return statements[0].text if len(statements) == 1 else None


def without_concurrently(statement: str) -> str:
    """Return a statement that can be executed in a transaction: what is done CONCURRENTLY is done plainly."""
    words = [token for token in _tokens(statement) if token.kind == "word"][: _NEAR * 2]
    for before, token in itertools.pairwise(words):
        if token.text.upper() == "CONCURRENTLY" and before.text.upper() == "INDEX":
            return statement[: token.start] + statement[token.end :]
    if words and words[0].text.upper() == "ALTER" and words[-1].text.upper() == "CONCURRENTLY":
        return statement[: words[-1].start]
    return statement
