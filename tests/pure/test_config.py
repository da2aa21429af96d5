"""node.toml: defaults, what is refused, and that an error says where and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmgsync.config import load_config
from pmgsync.errors import ConfigError


def write(directory: Path, text: str) -> Path:
    path = directory / "node.toml"
    path.write_text(text)
    return path


def test_everything_has_a_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""))
    assert (config.events_port, config.control_port, config.join_port) == (7670, 7671, 7672)
    assert config.state_dir == Path("/var/lib/pmgsync")
    assert config.broker_socket == Path("/run/pmgsync/broker.sock")
    assert config.profile == "pmg"
    assert config.config_root is None
    assert config.synchronous_commit is True
    assert config.journal.max_bytes == 4 << 30
    assert config.journal.max_age_s == 7 * 86400
    assert config.name
    assert config.address


def test_every_key_is_read(tmp_path: Path) -> None:
    text = """
    [node]
    name = "pmg1"
    address = "192.0.2.11"
    state_dir = "/a"
    run_dir = "/b"
    profile = "mirror"
    [ports]
    events = 1
    control = 2
    join = 3
    [postgres]
    dsn = "dbname=x"
    synchronous_commit = "off"
    [files]
    config_root = "/c"
    spool_root = "/d"
    [journal]
    max_size = "10 MiB"
    max_age = "36h"
    """
    config = load_config(write(tmp_path, text))
    assert (config.name, config.address, config.profile, config.dsn) == ("pmg1", "192.0.2.11", "mirror", "dbname=x")
    assert (config.events_port, config.control_port, config.join_port) == (1, 2, 3)
    assert config.synchronous_commit is False
    assert (config.config_root, config.spool_root) == (Path("/c"), Path("/d"))
    assert (config.journal.max_bytes, config.journal.max_age_s) == (10 << 20, 36 * 3600.0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[ports]\nevents = 0", ("[ports] events", "0", "1 to 65535")),
        ('[ports]\nevents = "7670"', ("[ports] events", "port number")),
        ("[ports]\nevents = true", ("[ports] events", "port number")),
        ("[ports]\nevents = 7671", ("[ports]", "four different ports")),
        ('[node]\nstate_dir = "relative"', ("[node] state_dir", "absolute path")),
        ('[node]\nname = "a b"', ("[node] name", "letters")),
        ('[node]\nrun_dir = "/' + "x" * 107 + '"', ("[node] run_dir", "107 bytes")),
        ('[postgres]\ndsn = "app"', ("[postgres] dsn", "connection string")),
        ("[postgres]\nsynchronous_commit = true", ("[postgres] synchronous_commit", '"on" or "off"')),
        ('[journal]\nmax_size = "4 apples"', ("[journal] max_size", "4GiB")),
        ('[journal]\nmax_age = "0d"', ("[journal] max_age", "7d")),
        ('[node]\nadress = "x"', ("[node] adress", "did you mean 'address'")),
        ("[node]\nfoo = 1", ("[node] foo", "the keys here are")),
        ("[postgre]\n", ("postgre is not a key", "did you mean 'postgres'")),
        ("node = 1", ("[node]", "expected a table")),
        ("[node", ("not TOML",)),
    ],
)
def test_errors_name_file_key_and_expectation(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_the_file_is_found_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMGCM_CONFIG", str(write(tmp_path, '[node]\nname = "by-environment"')))
    assert load_config().name == "by-environment"
    monkeypatch.setenv("PMGCM_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config()
