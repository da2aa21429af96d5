"""The demo's files: a configuration on the master, a file for each quarantined mail, and who has them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from cli.demo.machine import DemoNode

ARRIVE_S = 30.0
CONFIGURATION = {"pmg.conf": "demo: one\n", "templates/main.cf.in": "# a template\n", "domains": "example.com\n"}


def config_root(node: DemoNode) -> Path:
    """Return a node's configuration directory."""
    return Path(node.directory) / "etc"


def spool_root(node: DemoNode) -> Path:
    """Return a node's spool."""
    return Path(node.directory) / "spool"


def write_configuration(node: DemoNode) -> None:
    """Give a node the configuration that it has before there is a cluster."""
    for name, text in CONFIGURATION.items():
        path = config_root(node) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def change_configuration(node: DemoNode) -> None:
    """Be the administrator who changes a file, makes one and removes one."""
    root = config_root(node)
    (root / "pmg.conf").write_text("demo: two\n", encoding="utf-8")
    (root / "templates/new.cf.in").write_text("# another\n", encoding="utf-8")
    (root / "domains").unlink()


def follow_change(nodes: Sequence[DemoNode]) -> list[str]:
    """Wait until the change is on all nodes; return sentences on when it was where.

    The name of a node that does not get it stands in one of them, too.
    """
    begun = time.monotonic()
    waiting, told = list(nodes), list[str]()
    while waiting and time.monotonic() - begun < ARRIVE_S:
        for node in [node for node in waiting if _has_change(config_root(node))]:
            waiting.remove(node)
            told.append(f"on {node.name} after {time.monotonic() - begun:.2f} s")
        time.sleep(0.01)
    what = "pmg.conf changed, templates/new.cf.in made, domains removed"
    lines = [f"{what}: {', '.join(told) or 'nowhere'}"]
    return lines + [f"{what}: not on {node.name} after {ARRIVE_S:g} s" for node in waiting]


def _has_change(root: Path) -> bool:
    try:
        changed = (root / "pmg.conf").read_text(encoding="utf-8") == "demo: two\n"
    except FileNotFoundError:
        return False
    return changed and (root / "templates/new.cf.in").exists() and not (root / "domains").exists()


def show_mail(nodes: Sequence[DemoNode], file: str) -> str:
    """Return a sentence on a quarantined mail's file: who has it, and what each has.

    Args:
        file: below the spool root, as cmailstore has it.
    """
    found: dict[str, list[str]] = {}
    for node in nodes:
        try:
            data = (spool_root(node) / file).read_bytes()
            what = f"{len(data)} bytes, BLAKE2b {hashlib.blake2b(data, digest_size=8).hexdigest()}"
        except FileNotFoundError:
            what = "not there"
        found.setdefault(what, []).append(node.name)
    return f"{file}: " + "; ".join(f"{what} on {', '.join(names)}" for what, names in found.items())


def mail_file(node: DemoNode, cid: int, number: int) -> Path:
    """Return where a quarantined mail lies; cmailstore has the path below the spool root."""
    return spool_root(node) / f"cluster/{cid}/spam/{number}"


def compare_trees(nodes: Sequence[DemoNode]) -> tuple[int, list[str]]:
    """Wait until all nodes have the same files; return how many the first has, and what still differs at the end."""
    deadline = time.monotonic() + ARRIVE_S
    while True:
        held = [_files(node) for node in nodes]
        names = {name for files in held for name in files}
        differing = sorted(name for name in names if len({files.get(name) for files in held}) > 1)
        if not differing or time.monotonic() > deadline:
            return len(held[0]), [f"the file {name} is not the same on all nodes" for name in differing]
        time.sleep(0.2)


def _files(node: DemoNode) -> dict[str, str]:
    """Return the digests of a node's files, by name; pmgsync's own directories aside."""
    found = {}
    for root in (config_root(node), spool_root(node)):
        for path in root.rglob("*"):
            name = path.relative_to(root.parent)
            try:
                if path.is_file() and ".pmgsync" not in name.parts:
                    found[ascii(str(name))[1:-1]] = hashlib.blake2b(path.read_bytes()).hexdigest()
            except FileNotFoundError:
                continue  # it has just gone
    return found
