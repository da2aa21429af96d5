"""The SQL that pmgsync installs in a database, one file a subject, read by name."""

from __future__ import annotations

from pathlib import Path


def script(name: str) -> bytes:
    """Return the text of a file of this folder, for example `"schema.sql"`."""
    return Path(__file__).with_name(name).read_bytes()
