"""What the gateway's own daemons have on this machine: where their files are, and the keys that the host shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from pmgsync.config import NodeConfig
from pmgsync.core.profile import Profile
from pmgsync.errors import ConfigError

RSA = "ssh-rsa"
HostKeys = tuple[tuple[str, str], ...]
"""Names and values of `pmgsync.core.cluster_conf.HOST_KEYS`, without those that this host does not have."""


def cluster_conf_path(config: NodeConfig, profile: Profile) -> Path | None:
    """Return where cluster.conf is to be written; None when there is no gateway to read it."""
    path = config.cluster_conf
    if path is None:
        path = _moved(profile.gateway.cluster_conf, config, profile)
        if path and not Path(path).parent.is_dir():
            return None
    return Path(path) if path else None


def read_host_keys(config: NodeConfig, profile: Profile) -> HostKeys:
    """Return what this host shows of itself; what does not exist is left out.

    Raises:
        ConfigError: when a file is there and cannot be read, or is something else.
    """
    gateway = profile.gateway
    found = []
    for name, path, what, read in (
        ("fingerprint", gateway.certificate, "a certificate", _certificate_fingerprint),
        ("hostrsapubkey", gateway.host_key, "a public RSA key", _rsa_key),
        ("rootrsapubkey", gateway.root_key, "a public RSA key", _rsa_key),
    ):
        value = _read(_moved(path, config, profile), what, read)
        if value:
            found.append((name, value))
    return tuple(found)


def _moved(path: str, config: NodeConfig, profile: Profile) -> str:
    """Return a path of the profile where node.toml has it: `config_root` stands for a root of the profile."""
    if not path or config.config_root is None:
        return path
    for tree in profile.files:
        if tree.setting == "config_root" and Path(path).is_relative_to(tree.root):
            return str(config.config_root / Path(path).relative_to(tree.root))
    return path


def _read(path: str, what: str, read: Callable[[bytes], str]) -> str:
    if not path:
        return ""
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", hint="see that this user may read it") from error
    try:
        return read(data)
    except ValueError as error:
        raise ConfigError(f"{path} is not {what}", hint="make it anew, or move it away") from error


def _certificate_fingerprint(data: bytes) -> str:
    return x509.load_pem_x509_certificate(data).fingerprint(SHA256()).hex(":").upper()


def _rsa_key(data: bytes) -> str:
    words = data.decode("ascii").split()
    if words[:1] != [RSA] or len(words) < 2:
        raise ValueError
    return words[1]
