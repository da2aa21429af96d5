"""How a joining node knows the master, and how it proves that it may join."""

from __future__ import annotations

import re
from pathlib import Path

from cli.console import ask_secret, confirm, note
from pmgsync.core.members import format_fingerprint, parse_fingerprint
from pmgsync.errors import ConfigError, MembershipError

JOIN_CMD = "run `pmgcm join-cmd` on the master; it prints the whole line, with fingerprint and token"
_TOKEN = re.compile(r"[A-Za-z2-7]{26}")


def server_key(master_ip: str, key_port: int, fingerprint: str | None, *, yes: bool) -> bytes:
    """Return the master's CURVE public key: the one that was given, or the one that a person has confirmed.

    Raises:
        MembershipError: when it was not confirmed, or nobody can be asked.
        UnreachableError: when the master does not tell it.
    """
    from broker.cluster.door_client import fetch_key

    if fingerprint:
        return parse_fingerprint(fingerprint)
    if yes:
        raise MembershipError(
            "--yes needs the master's fingerprint (--fingerprint): without it anybody who answers at that address "
            "would be trusted",
            hint=JOIN_CMD,
        )
    key = fetch_key(master_ip, key_port)
    note(f"the node at {master_ip} says that its fingerprint is")
    note(f"    {format_fingerprint(key)}")
    note("`pmgcm join-cmd` on the master shows the right one; from now on only a node with this key is spoken to")
    confirm("Is it the master's?", option="--fingerprint")
    return key


def proof(token: str | None, password_file: Path | None) -> dict[str, str]:
    """Return the proof for the join door: a token, or the password of the master's root user.

    Raises:
        ConfigError: when the file cannot be read.
        PmgsyncError: when nobody can be asked.
    """
    if token is not None and password_file is not None:
        raise ConfigError("--token and --password-file were both given", hint="give one of them")
    if token is not None:
        return {"token": token}
    if password_file is not None:
        try:
            return {"password": password_file.read_text(encoding="utf-8").split("\n", 1)[0]}
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the password file {password_file} cannot be read ({error})") from error
    answer = ask_secret("password of root on the master, or a token", without_terminal=JOIN_CMD)
    return {"token": answer} if _TOKEN.fullmatch(answer) else {"password": answer}
