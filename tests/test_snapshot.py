"""Snapshots and restores on real servers: exact vectors, raw bytes, tables that change meanwhile, interruptions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extras import LogicalReplicationConnection

from pmgsync import demo
from pmgsync.errors import PmgsyncError, PreflightError, ProtocolError
from pmgsync.positions import LAST
from pmgsync.postgres import exported
from pmgsync.postgres import snapshot as snapshot_module
from pmgsync.postgres.dump import find_pg_dump, plain_sql
from pmgsync.postgres.embedded import EmbeddedPostgres
from pmgsync.postgres.provision import provision
from pmgsync.postgres.restore import ChainRestore, DatabaseRestore
from pmgsync.postgres.session import connect
from pmgsync.postgres.snapshot import database_facts, take_chain_snapshot, take_database_snapshot
from pmgsync.profile import Profile, load_profile

CLUSTER = b"0123456789abcdef"
ALL_BYTES = bytes(byte for byte in range(1, 256))
