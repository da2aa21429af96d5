"""`cluster.conf`, the file in which the gateway's own daemons read who is in the cluster: its text, read and changed.

    master: 1
        fingerprint 5A:30:…
        ip 192.0.2.11
        maxcid 2
        name pmg1

    node: 2
        …

A section is a line `master: CID` or `node: CID` and the lines `key value` below it, indented by a tab. Lines that are
none of this are kept as they are and where they are, and so are keys that are not known here: the gateway may write
more than we know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pmgsync.errors import ProtocolError

HOST_KEYS = ("fingerprint", "hostrsapubkey", "rootrsapubkey")
"""What a member's host shows of itself: the SHA-256 of its API certificate, and two RSA public keys."""
KEYS = (*HOST_KEYS, "ip", "maxcid", "name")
"""The keys that are written here, in the order in which new ones are put down."""
KINDS = frozenset({"master", "node"})

_HEADER = re.compile(r"([A-Za-z0-9_-]+):[ \t]*(\S+)[ \t]*")
_PROPERTY = re.compile(r"[ \t]+(\S+)(?:[ \t]+(.*?))?[ \t]*")
_VALUE = re.compile(r"[^\x00-\x1f\x7f]+")


@dataclass(frozen=True, slots=True)
class Section:
    """One section, or what stands before the first one.

    Attributes:
        kind, name: of the header line; "" for what stands before the first.
        lines: all lines below the header, as they are in the file.
    """

    kind: str
    name: str
    lines: tuple[str, ...]
    header: str = ""

    @property
    def cid(self) -> int:
        """The CID of a member's section, 0 for any other."""
        return int(self.name) if self.kind in KINDS and re.fullmatch(r"[1-9][0-9]{0,9}", self.name) else 0

    @property
    def values(self) -> dict[str, str]:
        """The properties by their keys; the first line of a key counts."""
        found: dict[str, str] = {}
        for line in self.lines:
            if (match := _PROPERTY.fullmatch(line)) is not None:
                found.setdefault(match[1], match[2] or "")
        return found

    def with_values(self, values: Mapping[str, str | None]) -> Section:
        """Return the section with these values of keys, each on one line; None removes a key.

        Raises:
            ProtocolError: when a value cannot stand on a line.
        """
        for key, value in values.items():
            if value is not None and (_VALUE.fullmatch(value) is None or value != value.strip()):
                raise ProtocolError(f"{value!r:.60} cannot be the {key} of a member in cluster.conf")
        left = {key: value for key, value in values.items() if value is not None}
        lines = []
        for line in self.lines:
            match = _PROPERTY.fullmatch(line)
            key = match[1] if match is not None else ""
            if match is None or key not in values:
                lines.append(line)
            elif key in left:
                value = left.pop(key)
                lines.append(line if match[2] == value else f"\t{key} {value}")
        at = len(lines)
        while at and not lines[at - 1].strip():
            at -= 1
        order = [*(key for key in KEYS if key in left), *(key for key in left if key not in KEYS)]
        lines[at:at] = [f"\t{key} {left[key]}" for key in order]
        return replace(self, lines=tuple(lines))


@dataclass(frozen=True, slots=True)
class ConfMember:
    """A member as it is to stand in the file.

    Attributes:
        host_keys: by the names of `HOST_KEYS`; one that is missing is not known here: its line stays as it is.
    """

    cid: int
    name: str
    address: str
    master: bool
    host_keys: Mapping[str, str]


def parse(text: str) -> tuple[Section, ...]:
    """Return a file's sections. Nothing is an error, and `render` gives back every text as it was."""
    sections: list[Section] = []
    kind = name = header = ""
    lines: list[str] = []
    for line in text.split("\n"):
        match = _HEADER.fullmatch(line)
        if match is None:
            lines.append(line)
            continue
        sections.append(Section(kind, name, tuple(lines), header))
        kind, name, header, lines = match[1], match[2], line, []
    sections.append(Section(kind, name, tuple(lines), header))
    return tuple(section for number, section in enumerate(sections) if number or section.lines)


def render(sections: Iterable[Section]) -> str:
    """Return the text of sections."""
    lines: list[str] = []
    for section in sections:
        if section.kind:
            lines.append(section.header or f"{section.kind}: {section.name}")
        lines += section.lines
    return "\n".join(lines)


def with_members(sections: Sequence[Section], members: Iterable[ConfMember], max_cid: int) -> tuple[Section, ...]:
    """Return the sections of a file as they are to be with these members.

    Members that are in the file stay in their places, others follow at the end, and sections of nodes that are not
    members go. `max_cid` stands in the master's section alone.

    Raises:
        ProtocolError: when a member's name, address or key cannot stand in the file.
    """
    wanted = {member.cid: member for member in members}
    result: list[Section] = []
    for section in sections:
        if section.kind not in KINDS:
            result.append(section)
        elif (member := wanted.pop(section.cid, None)) is not None:
            result.append(_with_member(section, member, max_cid))
    result += [_with_member(Section("node", str(cid), ("",)), wanted[cid], max_cid) for cid in sorted(wanted)]
    return _apart(result)


def _with_member(section: Section, member: ConfMember, max_cid: int) -> Section:
    kind = "master" if member.master else "node"
    if section.kind != kind:
        section = replace(section, kind=kind, header="")
    return section.with_values(
        {
            **{key: value for key, value in member.host_keys.items() if key in HOST_KEYS},
            "ip": member.address,
            "maxcid": str(max_cid) if member.master else None,
            "name": member.name,
        }
    )


def _apart(sections: Iterable[Section]) -> tuple[Section, ...]:
    """Put an empty line between sections, and end the file with its last line's end."""
    kept = [section for section in sections if section.kind or any(line.strip() for line in section.lines)]
    result = []
    for number, section in enumerate(kept, 1):
        lines = list(section.lines)
        while lines and not lines[-1].strip():
            lines.pop()
        lines += ["", ""] if number < len(kept) and (lines or section.kind) else [""]
        result.append(replace(section, lines=tuple(lines[:-1] if number < len(kept) else lines)))
    return tuple(result)
