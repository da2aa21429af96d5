"""Pairs of databases for the tests of apply."""

from __future__ import annotations

from collections.abc import Callable

from tests.harness.server import Pair

MakePair = Callable[..., Pair]
