"""Upkeep of a node's database: what it does while roles change under it."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import psycopg2
import psycopg2.errors
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.agent.fence import Fence
from pmgsync.agent.upkeep import Upkeep
from pmgsync.postgres.setup.guard import ensure_guard
from pmgsync.postgres.setup.upkeep_steps import UpkeepSession
from pmgsync.profile_file import load_profile
from tests.broker.test_voter import document
from tests.harness.database import Database


def stands(fence: Fence) -> bool:
    return fence.is_as_wanted


def test_a_round_by_the_document_of_before_does_not_open_a_master_that_was_replaced(server: EmbeddedPostgres) -> None:
    """It began while this node was the master, and the broker speaks of the next epoch before it comes to the guard."""
    database, profile, fence = Database(server), load_profile("mirror"), Fence()
    database.sql("CREATE TABLE public.t (id int PRIMARY KEY)")
    database.provision(profile, cid=1)
    before = replace(document((1, 2, 3)).document, fence="lease")
    ensure_guard(database.dsn, profile, master=before.member(1), fenced=True)
    upkeep = Upkeep(database.dsn, profile, lambda: (1, before), fence, lambda _: True)
    with contextlib.closing(UpkeepSession(database.dsn, profile)) as session:
        fence.want(before.epoch + 1, fenced=False)
        upkeep.round(session)
        assert not stands(fence)
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            database.sql("INSERT INTO public.t VALUES (1)")
        # Of its own epoch it is asked to, when no third member is left, and opens.
        fence.want(before.epoch, fenced=False)
        upkeep = Upkeep(database.dsn, profile, lambda: (1, before), fence, lambda _: True)
        upkeep.round(session)
        assert stands(fence)
        database.sql("INSERT INTO public.t VALUES (1)")
