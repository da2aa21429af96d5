"""Trees: which of them a cluster has, who answers for each, and when one looks as if its disk were gone. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pmgsync.core.membership import ClusterDocument
from pmgsync.core.profile import FileTree, Profile

EMPTIED_CONFIG = 2
EMPTIED_SPOOL = 100
"""A tree with this many files never loses all of them at once; a smaller one may: a small quarantine is purged in one
night."""


@dataclass(frozen=True, slots=True)
class Tree:
    """One tree of a cluster.

    Attributes:
        name: the same on every node: the directory as the profile names it, whatever node.toml puts in its place.
        rule: what the profile says of it.
        below: of a spool, the directory below the root, "" otherwise.
        owner: CID of the node that answers for it.
        gone: of a spool, the node that wrote it is no member any more. The master answers for it, but each node keeps
            what it has: no node has all of it for certain.
    """

    name: str
    rule: FileTree
    below: str
    owner: int
    gone: bool = False

    @property
    def is_config(self) -> bool:
        return self.rule.kind == "config"

    @property
    def of_master(self) -> bool:
        """True when whoever is master answers for it."""
        return self.is_config or self.gone


def trees_of(profile: Profile, document: ClusterDocument) -> dict[str, Tree]:
    """Return every tree of the cluster by its name.

    A config tree and the spools of nodes that are gone are the master's; a member's spool is its own.
    """
    found: dict[str, Tree] = {}
    for rule in profile.files:
        if rule.kind == "config":
            found[rule.root] = Tree(rule.root, rule, "", document.master)
            continue
        for cid in range(1, document.max_cid + 1):
            below = rule.tree.replace("{cid}", str(cid))
            name = posixpath.join(rule.root, below)
            gone = document.member(cid) is None
            found[name] = Tree(name, rule, below, document.master if gone else cid, gone)
    return found


def looks_vanished(before: int, after: int, *, config: bool) -> bool:
    """True when a tree lost all its files at once, as it does when its disk is not mounted.

    Args:
        before, after: numbers of files.
    """
    return after == 0 and before >= (EMPTIED_CONFIG if config else EMPTIED_SPOOL)


def profile_path(tree: Tree, name: bytes) -> bytes:
    """Return the absolute path of a name as the profile's actions name it."""
    return posixpath.join(tree.name.encode("utf-8", "surrogateescape"), name)


def touched_actions(
    profile: Profile, paths: Iterable[bytes], tables: Iterable[str], role: str = ""
) -> list[tuple[str, ...]]:
    """Return the commands that a batch of changes asks for, each once, in the profile's order.

    Args:
        paths: absolute, as `profile_path` returns them. An action whose path ends in "/" means all in that directory.
        role: `master` or `node`, when this node has become that.
    """
    if not profile.actions:
        return []
    changed, named = set(paths), set(tables)
    found: dict[tuple[str, ...], None] = {}
    for action in profile.actions:
        patterns = [path.encode("utf-8", "surrogateescape") for path in action.files]
        by_file = any(
            path == pattern or (pattern.endswith(b"/") and path.startswith(pattern))
            for pattern in patterns
            for path in changed
        )
        if by_file or named.intersection(action.tables) or (role and role == action.role):
            found.setdefault(action.run)
    return list(found)


MAX_REPORTED = 64
"""Trees that a heartbeat has room for; a cluster has at most 64 members."""
_NUMBERS = ("owner", "files", "bytes", "behind", "findings")


def read_tree_reports(value: object) -> list[dict[str, Any]]:
    """Return what a worker or a member says of its trees; what is not of this shape is left out.

    Each has `tree` (its name), `owner` (CID), `of_master` (whoever is master answers for it), `files`, `bytes`,
    `behind` (names that are not in place here), `behind_s` (for how long), `findings` (what is left out), `error`
    (text, "" when well).
    """
    found = []
    for each in value[:MAX_REPORTED] if isinstance(value, list) else []:
        if not isinstance(each, dict) or not isinstance(each.get("tree"), str):
            continue
        numbers = {key: each.get(key) for key in _NUMBERS}
        behind_s = each.get("behind_s")
        if all(type(number) is int and 0 <= number < 1 << 63 for number in numbers.values()) and type(behind_s) in {
            int,
            float,
        }:
            error = str(each.get("error", ""))[:500]
            of_master = each.get("of_master") is not False
            name = each["tree"][:200]
            found.append({"tree": name, "of_master": of_master, **numbers, "behind_s": behind_s, "error": error})
    return found


MAX_ACTIONS = 16
"""Commands that a heartbeat has room for: those that ran last."""


def read_action_reports(value: object) -> list[dict[str, Any]]:
    """Return what a worker or a member says of the actions that it ran; what is not of this shape is left out.

    Each has `run` (the command), `at` (when it ended, seconds since 1970), `error` (text, "" when it went well).
    """
    return [
        {"run": each["run"][:200], "at": each["at"], "error": str(each.get("error", ""))[:500]}
        for each in (value[:MAX_ACTIONS] if isinstance(value, list) else ())
        if isinstance(each, dict)
        and isinstance(each.get("run"), str)
        and type(each.get("at")) is int
        and 0 <= each["at"] < 1 << 40
    ]
