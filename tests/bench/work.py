"""The tables and the work: what is written on the publisher, the same for both systems."""

from __future__ import annotations

import subprocess

from pmgsync.postgres.programs import pg_tool, tool_environment
from tests.bench.servers import ask

SCHEMA = """
CREATE TABLE mark (id bigint PRIMARY KEY);
CREATE TABLE big (id bigint PRIMARY KEY, who text NOT NULL, at timestamptz NOT NULL, n int NOT NULL);
CREATE INDEX ON big (at);
CREATE INDEX ON big (n);
CREATE TABLE mail (id bigint PRIMARY KEY, sender text NOT NULL, bytes int NOT NULL, at timestamptz NOT NULL);
CREATE TABLE receiver (mail bigint, address text, blocked boolean NOT NULL, PRIMARY KEY (mail, address));
CREATE TABLE item (id bigint PRIMARY KEY, n int NOT NULL, text text NOT NULL, at timestamptz NOT NULL);
CREATE INDEX ON item (n);
CREATE TABLE keyless (n int, text text, amount numeric);
CREATE INDEX ON keyless (n);
ALTER TABLE keyless REPLICA IDENTITY FULL;
CREATE TABLE tick (id bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp());
"""
ROWS_A_TRANSACTION = 1000
PGBENCH_CLIENTS = 2


def fill_big(dsn: str, first: int, rows: int, mark: int) -> None:
    """Insert rows into a table with a key and two indexes, in one transaction with the mark."""
    ask(
        dsn,
        f"""WITH rows AS (
            INSERT INTO big SELECT i, 'user' || i || '@example.com', now() + i * interval '1 s', i % 9973
            FROM generate_series({first}::bigint, {first + rows - 1}) AS i RETURNING 1)
        INSERT INTO mark SELECT {mark} FROM (SELECT count(*) FROM rows) AS done""",
    )


def write_mail(dsn: str, first: int, count: int) -> None:
    """Commit transactions of three rows in two tables, as a gateway writes one mail each."""
    ask(
        f"{dsn} options='-c synchronous_commit=off'",
        f"""DO $$ BEGIN FOR i IN {first}..{first + count - 1} LOOP
            INSERT INTO mail VALUES (i, 'sender' || i || '@example.com', i * 7 % 100000, clock_timestamp());
            INSERT INTO receiver VALUES (i, 'first' || i % 500 || '@example.org', false);
            INSERT INTO receiver VALUES (i, 'second' || i % 700 || '@example.org', true);
            COMMIT; END LOOP; END $$""",
    )


def pgbench_schema(scale: int) -> str:
    """Return SQL that makes and fills pgbench's tables."""
    return f"""
    CREATE TABLE pgbench_branches (bid int PRIMARY KEY, bbalance int, filler char(88));
    CREATE TABLE pgbench_tellers (tid int PRIMARY KEY, bid int, tbalance int, filler char(84));
    CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int, filler char(84));
    CREATE TABLE pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22));
    INSERT INTO pgbench_branches SELECT i, 0, NULL FROM generate_series(1, {scale}) AS i;
    INSERT INTO pgbench_tellers SELECT i, (i - 1) / 10 + 1, 0, NULL FROM generate_series(1, {scale} * 10) AS i;
    INSERT INTO pgbench_accounts
        SELECT i, (i - 1) / 100000 + 1, 0, '' FROM generate_series(1, {scale} * 100000) AS i;
    """


def run_pgbench(dsn: str, scale: int, count: int, seed: int) -> None:
    """Commit TPC-B transactions with pgbench's built-in script."""
    done = subprocess.run(
        [
            pg_tool("pgbench"), "--no-vacuum", f"--scale={scale}", f"--client={PGBENCH_CLIENTS}", "--protocol=prepared",
            f"--transactions={count // PGBENCH_CLIENTS}", f"--random-seed={seed}",
            f"{dsn} options='-c synchronous_commit=off'",
        ],
        env=tool_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"pgbench: {done.stderr}")


def _batched(dsn: str, first: int, rows: int, statement: str) -> None:
    ask(
        f"{dsn} options='-c synchronous_commit=off'",
        f"""DO $$ DECLARE low bigint; high bigint; BEGIN
            FOR low IN SELECT generate_series({first}::bigint, {first + rows - 1}, {ROWS_A_TRANSACTION}) LOOP
                high := least(low + {ROWS_A_TRANSACTION} - 1, {first + rows - 1});
                {statement}; COMMIT;
            END LOOP; END $$""",
    )


def insert_items(dsn: str, first: int, rows: int) -> None:
    """Insert rows with a key, a thousand a transaction."""
    _batched(
        dsn, first, rows,
        "INSERT INTO item SELECT i, i % 9973, 'item number ' || i, now() FROM generate_series(low, high) AS i",
    )  # fmt: skip


def update_items(dsn: str, first: int, rows: int) -> None:
    """Change two columns of rows by key, a thousand a transaction."""
    _batched(dsn, first, rows, "UPDATE item SET n = n + 1, text = text || '!' WHERE id BETWEEN low AND high")


def delete_items(dsn: str, first: int, rows: int) -> None:
    """Delete rows by key, a thousand a transaction."""
    _batched(dsn, first, rows, "DELETE FROM item WHERE id BETWEEN low AND high")


def fill_keyless(dsn: str, rows: int) -> None:
    """Insert rows into a table without a key."""
    ask(dsn, f"INSERT INTO keyless SELECT i, 'text number ' || i, i * 1.10 FROM generate_series(1, {rows}) AS i")


def change_keyless(dsn: str, rows: int) -> None:
    """Update rows of the table without a key, then delete half of them; one transaction each."""
    ask(dsn, f"UPDATE keyless SET text = text || '!' WHERE n <= {rows}")
    ask(dsn, f"DELETE FROM keyless WHERE n <= {rows // 2}")
