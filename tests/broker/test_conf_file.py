"""cluster.conf on disk: written when something changed, with mode and owner of the old one, and never half."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from broker.cluster.conf_file import write_cluster_conf
from pmgsync.config import NodeConfig, load_config
from pmgsync.core.membership import ClusterDocument, Member, first_document, with_member
from pmgsync.errors import ConfigError
from pmgsync.gateway import cluster_conf_path, read_host_keys
from pmgsync.profile_file import load_profile


def config_at(directory: Path, *files: str) -> NodeConfig:
    """Return a configuration with these lines under [files]."""
    path = directory / "node.toml"
    path.write_text("\n".join(["[files]", *files, ""]))
    return load_config(path)


def a_member(number: int, host_keys: tuple[tuple[str, str], ...] = ()) -> Member:
    member = Member(number, f"pmg{number}", f"192.0.2.{number}", 7670, 7671, 7672, bytes([number]) * 32, bytes(32))
    return replace(member, host_keys=host_keys)


def a_document() -> ClusterDocument:
    founder = a_member(1, host_keys=(("fingerprint", "AA:BB"),))
    return with_member(first_document(b"c" * 16, "mail", "pmg", founder), a_member(2))


def test_a_new_file_is_for_everybody_to_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.conf"
    config = config_at(tmp_path, f'cluster_conf = "{path}"')
    assert write_cluster_conf(a_document(), config)
    assert path.read_text() == (
        "master: 1\n\tfingerprint AA:BB\n\tip 192.0.2.1\n\tmaxcid 2\n\tname pmg1\n\n"
        "node: 2\n\tip 192.0.2.2\n\tname pmg2\n"
    )
    assert path.stat().st_mode & 0o7777 == 0o644
    before = path.stat().st_ino
    assert not write_cluster_conf(a_document(), config), "nothing changed"
    assert path.stat().st_ino == before
    assert write_cluster_conf(None, config)
    assert path.read_text() == ""
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cluster.conf", "node.toml"]


def test_mode_owner_and_foreign_bytes_stay(tmp_path: Path) -> None:
    path = tmp_path / "cluster.conf"
    path.write_bytes(b"# \xff\xfe\n\nmaster: 1\n\tname pmg1\n\tweight 7\n")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 0, 4242)
    link = tmp_path / "link.conf"
    link.symlink_to(path)
    before = path.stat()
    assert write_cluster_conf(a_document(), config_at(tmp_path, f'cluster_conf = "{link}"'))
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino, "replaced, not written into"
    assert link.is_symlink()
    assert path.read_bytes().startswith(b"# \xff\xfe\n\nmaster: 1\n\tname pmg1\n\tweight 7\n\tfingerprint AA:BB\n")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    config = config_at(tmp_path, f'cluster_conf = "{tmp_path}/node.toml/cluster.conf"')
    with pytest.raises(ConfigError, match=r"cluster\.conf cannot be written \(Not a directory\)"):
        write_cluster_conf(a_document(), config)


def test_where_it_is(tmp_path: Path) -> None:
    pmg, mirror = load_profile("pmg"), load_profile("mirror")
    root = tmp_path / "etc"
    moved = config_at(tmp_path, f'config_root = "{root}"')
    assert cluster_conf_path(moved, pmg) is None, "no gateway here"
    root.mkdir()
    assert cluster_conf_path(moved, pmg) == root / "cluster.conf"
    assert cluster_conf_path(moved, mirror) is None
    assert cluster_conf_path(config_at(tmp_path, f'config_root = "{root}"', 'cluster_conf = ""'), pmg) is None
    named = config_at(tmp_path, 'cluster_conf = "/x/cluster.conf"')
    assert cluster_conf_path(named, mirror) == Path("/x/cluster.conf")


def test_the_keys_of_a_host(tmp_path: Path) -> None:
    """Made by the programs that make them on a gateway; each of them may be missing."""
    root = tmp_path / "etc"
    root.mkdir()
    config = config_at(tmp_path, f'config_root = "{root}"')
    profile = load_profile("pmg")
    moved = replace(profile.gateway, host_key="/etc/pmg/host.pub", root_key="/etc/pmg/no.pub")
    profile = replace(profile, gateway=moved)
    assert read_host_keys(config, profile) == ()
    key, certificate = str(root / "key.pem"), str(root / "pmg-api.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=pmg1", "-keyout", key]
    subprocess.run([*make, "-out", certificate], check=True, capture_output=True)
    show = ["openssl", "x509", "-in", certificate, "-noout", "-fingerprint", "-sha256"]
    shown = subprocess.run(show, check=True, capture_output=True, text=True).stdout.strip()
    (root / "host.pub").write_text("ssh-rsa AAAAB3Nz root@pmg1\n")
    found = read_host_keys(config, profile)
    assert dict(found) == {"fingerprint": shown.partition("=")[2], "hostrsapubkey": "AAAAB3Nz"}
    member = a_member(1, host_keys=found)
    assert Member.from_map(member.to_map()) == member
    (root / "host.pub").write_text("something else")
    with pytest.raises(ConfigError, match=r"host\.pub is not a public RSA key"):
        read_host_keys(config, profile)
