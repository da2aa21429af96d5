"""The plan of a rename pass: the steps, in order, from what a tree holds to what its owner says. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pmgsync.core.filenames import parents, show
from pmgsync.core.manifests import Change, Entry, Manifest
from pmgsync.errors import ProtocolError


class Step(NamedTuple):
    """One step of a pass.

    Attributes:
        what: `remove` the name; `directory`: make it; `put` a verified file in its place; `set` mode, owner and time.
        entry: what the name is afterwards, None when it is gone.
        keep: what is there now was written on this node only: it is kept under another name. Of a directory that is
            removed: it must make room even if something is left in it.
    """

    what: Literal["remove", "directory", "put", "set"]
    name: bytes
    entry: Entry | None = None
    keep: bool = False


def plan_pass(
    wanted: Mapping[bytes, Entry], actual: Mapping[bytes, Entry], held: Mapping[bytes, Entry], names: Iterable[bytes]
) -> list[Step]:
    """Return the steps after which these names are as wanted.

    First what is in the way is removed (a file where a directory is to be, or the other way round). Then directories
    are made, outer ones first. Then files are put in place. Only then the rest is removed, inner names first. So a file
    that refers to a new file finds it, and one that refers to an old file still finds that.

    Args:
        actual: what the tree has now, as far as it is known.
        held: what it had from the owner when it was last in step; what `actual` has otherwise was written here.
        names: which names to look at; all others are taken to be right.
    """
    in_the_way: dict[bytes, Step] = {}
    directories: list[Step] = []
    puts: list[Step] = []
    removes: dict[bytes, Step] = {}
    for name in set(names):
        new, old = wanted.get(name), actual.get(name)
        if new == old:
            continue
        keep = (
            old is not None and old.kind == "f" and not old.same_content(held.get(name)) and not old.same_content(new)
        )
        if new is None:
            removes[name] = Step("remove", name, None, keep)
            continue
        if old is not None and old.kind != new.kind:
            in_the_way[name] = Step("remove", name, None, keep or old.kind == "d")
            prefix = name + b"/"
            for inner in [each for each in actual if each.startswith(prefix)] if old.kind == "d" else ():
                entry = actual.get(inner)
                local = entry is not None and entry.kind == "f" and not entry.same_content(held.get(inner))
                in_the_way[inner] = Step("remove", inner, None, local)
            old = None
        if new.kind == "d":
            directories.append(Step("directory" if old is None else "set", name, new))
        elif new.same_content(old):
            puts.append(Step("set", name, new))
        else:
            puts.append(Step("put", name, new, keep and name not in in_the_way))
    rest = [step for name, step in removes.items() if name not in in_the_way]
    return [
        *sorted(in_the_way.values(), key=lambda step: step.name, reverse=True),
        *sorted(directories, key=lambda step: step.name),
        *sorted(puts, key=lambda step: step.name),
        *sorted(rest, key=lambda step: step.name, reverse=True),
    ]


def check_shape(manifest: Manifest, changes: Iterable[Change]) -> None:
    """Check that none of the changed names lies below a file; `manifest` has them already.

    Raises:
        ProtocolError: when they do: no tree can look like that.
    """
    outers: set[bytes] = set()
    for name, entry in changes:
        # Names that follow each other mostly lie in the same directory.
        if entry is not None and name.rpartition(b"/")[0] not in outers:
            outers.update(parents(name))
    for outer in outers:
        above = manifest.get(outer)
        if above is not None and above.kind == "f":
            raise ProtocolError(f"a name lies below {show(outer)}, which is a file")
