"""The subscription level: where it is found, and a sentence for each way in which it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pmgsync.config import Subscription, load_config
from pmgsync.errors import ConfigError
from pmgsync.subscription import level_difference, read_level


def test_nothing_is_said() -> None:
    assert read_level(Subscription()) == ""


def test_it_is_said_in_node_toml(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('[subscription]\nlevel = "basic"\ndiffering = "refuse"\n')
    subscription = load_config(path).subscription
    assert (read_level(subscription), subscription.differing) == ("basic", "refuse")


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "level"
    path.write_text("\n  premium \nmore\n")
    assert read_level(Subscription(file=str(path))) == "premium"
    path.write_text("key: x\nlevel: c\n")
    assert read_level(Subscription(file=str(path), pattern=r"level:\s*(\w+)")) == "c"
    for text, pattern, sentence in (
        ("", "", "has no subscription level"),
        ("key: x", r"level:\s*(\w+)", "has no subscription level that"),
        ("a\x1b[2Jb", "", "is not a word"),
        ("x" * 65, "", "is not a word"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            read_level(Subscription(file=str(path), pattern=pattern))
    with pytest.raises(ConfigError, match="cannot be read from"):
        read_level(Subscription(file=str(tmp_path / "none")))


def test_a_command() -> None:
    def command(script: str) -> Subscription:
        return Subscription(command=(sys.executable, "-c", script))

    assert read_level(command("print('standard')")) == "standard"
    with pytest.raises(ConfigError, match=r"ended with 3 \(no key\)"):
        read_level(command("import sys; print('no key', file=sys.stderr); sys.exit(3)"))
    with pytest.raises(ConfigError, match="cannot be run"):
        read_level(Subscription(command=("/nonexistent/program",)))


@pytest.mark.parametrize(
    "text",
    [
        'file = "relative"',
        "command = []",
        'pattern = "no group"',
        'pattern = "("',
        'differing = "shrug"',
        'level = "a"\nfile = "/b"',
        'levl = "a"',
    ],
)
def test_what_node_toml_may_not_say(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(f"[subscription]\n{text}\n")
    with pytest.raises(ConfigError, match=r"node\.toml: \[subscription\]"):
        load_config(path)


def test_levels_that_differ() -> None:
    assert level_difference("basic", "basic") == ""
    assert level_difference("", "basic") == ""
    assert "'basic', the cluster's is 'premium'" in level_difference("basic", "premium")
