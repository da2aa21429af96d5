-- What applying needs in every member's database. Running it again changes nothing.

CREATE SCHEMA IF NOT EXISTS pmgsync;

-- The node's state vector: how far it is on each origin's chain. Written by the transaction that applies the changes.
CREATE TABLE IF NOT EXISTS pmgsync.position (
    origin integer PRIMARY KEY,
    incarnation bigint NOT NULL,
    lsn pg_lsn NOT NULL,
    part bigint NOT NULL DEFAULT 4294967295,
    commit_time timestamptz
);

-- Tables that this database cannot take from an origin as they are there. Written by the transaction that leaves something
-- out. kind: `table`, every change is left out; `columns`, those columns are; `none`, the table was fetched anew. Changes
-- at or below `until` are in what was fetched.
CREATE TABLE IF NOT EXISTS pmgsync.stale_table (
    origin integer NOT NULL,
    schema name NOT NULL,
    name name NOT NULL,
    kind text NOT NULL CHECK (kind IN ('table', 'columns', 'none')),
    reason text NOT NULL,
    columns name[] NOT NULL DEFAULT '{}',
    lsn pg_lsn NOT NULL,
    until pg_lsn NOT NULL DEFAULT '0/0',
    since timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (origin, schema, name)
);

-- Which table of the origin a name was last: with another OID it is another table.
CREATE TABLE IF NOT EXISTS pmgsync.relation (
    origin integer NOT NULL,
    schema name NOT NULL,
    name name NOT NULL,
    relation bigint NOT NULL,
    PRIMARY KEY (origin, schema, name)
);

-- The newest conflicts that were resolved by a rule, for people.
CREATE TABLE IF NOT EXISTS pmgsync.conflict (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    noticed timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    origin integer NOT NULL,
    lsn pg_lsn NOT NULL,
    table_name text NOT NULL,
    kind text NOT NULL
);

-- Keeps the newest 10 000: the log must not fill a disk.
CREATE OR REPLACE FUNCTION pmgsync.log_conflict(origin integer, lsn pg_lsn, table_name text, kind text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog AS $$
    INSERT INTO pmgsync.conflict (origin, lsn, table_name, kind) VALUES ($1, $2, $3, $4);
    DELETE FROM pmgsync.conflict WHERE id <= (SELECT max(c.id) FROM pmgsync.conflict AS c) - 10000;
$$;

-- Ends a batch in which a statement did not hit exactly one row. The batch is applied again row by row, which says more.
CREATE OR REPLACE FUNCTION pmgsync.diverged() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    RAISE EXCEPTION 'a change did not hit exactly one row' USING ERRCODE = 'PS001';
END
$$;

-- Tells the session that a row to change was not there; "what" is a number of the session's own.
CREATE OR REPLACE FUNCTION pmgsync.missing(what integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    RAISE NOTICE 'pmgsync missing %', what;
END
$$;
