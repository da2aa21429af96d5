-- The guard: on nodes that are not the master it refuses to write tables that the master writes, and on a master that is
-- fenced it does so while its lease does not hold. Running it again changes nothing. Triggers do not fire under
-- session_replication_role = replica: applying is not refused.

-- Closing takes no lock on any table: it changes a row here, or a value of pmgsync.lease.
-- One row on a node that is guarded: not fenced: another node is the master; fenced: this one is. None: nothing is refused.
CREATE TABLE IF NOT EXISTS pmgsync.guard (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    master text NOT NULL,
    address text NOT NULL
);
ALTER TABLE pmgsync.guard ADD COLUMN IF NOT EXISTS fenced boolean NOT NULL DEFAULT false;

-- The lease: until when this master may write, by this server's clock in ms since 1970, times 2^20, plus the ms that it had
-- to go when it was written. A sequence, not a row: every transaction sees its newest value, also one in REPEATABLE READ
-- that began before the last renewal, and writing it each second leaves nothing to vacuum. Unlogged: after a crash it is 0,
-- so a server that comes back is closed until a majority has been heard.
CREATE UNLOGGED SEQUENCE IF NOT EXISTS pmgsync.lease AS bigint MINVALUE 0 START 0;

-- The newest epoch for which the values that the sequences' other users have handed out were passed on this node: before
-- that, a node that has become master opens nothing.
CREATE TABLE IF NOT EXISTS pmgsync.reign (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL
);

-- One row for each open transaction that has written a table of the master's, so that its commit is checked too: a trigger
-- that waits for the commit is one for each row, which nobody wants on tables that take millions of them.
CREATE UNLOGGED TABLE IF NOT EXISTS pmgsync.writer (xid xid8 NOT NULL);

-- What follows up to refuse_commit is called for every statement that writes. SET search_path would cost microseconds there,
-- and so would a query. So names and operators are written with their schema, and the sequence is read by a function.
-- A clock that was set back to before the lease was written closes, one set back less than that cannot make the lease last
-- twice as long. A second is let pass: clocks are corrected by that much all the time.
-- NULL, like what pg_sequence_last_value returns after a crash, is no lease.
CREATE OR REPLACE FUNCTION pmgsync.lease_holds(value bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    now_ms double precision := pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) OPERATOR(pg_catalog.*) 1000;
    until_ms bigint := value OPERATOR(pg_catalog.>>) 20;
    left_ms bigint := value OPERATOR(pg_catalog.&) 1048575;
BEGIN
    RETURN (now_ms OPERATOR(pg_catalog.<) until_ms
            AND now_ms OPERATOR(pg_catalog.>=) (until_ms OPERATOR(pg_catalog.-) left_ms OPERATOR(pg_catalog.-) 1000))
           IS TRUE;
END
$$;

-- Takes the deadline as a time of this server's clock; NULL closes at once.
CREATE OR REPLACE FUNCTION pmgsync.set_lease(until_ms bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now_ms bigint := floor(extract(epoch FROM clock_timestamp()) * 1000);
    left_ms bigint := least(until_ms - now_ms, 1048575);
BEGIN
    PERFORM setval('pmgsync.lease', CASE WHEN until_ms > now_ms THEN ((now_ms + left_ms) << 20) + left_ms ELSE 0 END);
END
$$;
REVOKE EXECUTE ON FUNCTION pmgsync.set_lease(bigint) FROM PUBLIC;

CREATE OR REPLACE FUNCTION pmgsync.raise_closed(what text, schema text, name text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    g record;
BEGIN
    SELECT m.master, m.address, m.fenced INTO g FROM pmgsync.guard AS m;
    IF g.fenced THEN
        RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
            MESSAGE = format('%s: this node, %s, is the master of the cluster, but a majority of the members does not '
                             'answer it', what, g.master),
            HINT = 'It opens by itself when they do; `pmgcm status` says who is missing. If another node was promoted '
                   'meanwhile, make this change there.',
            SCHEMA = schema, TABLE = name;
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
        MESSAGE = format('%s by the master of the cluster alone, %s (%s)', what, g.master, g.address),
        HINT = format('Make this change on %s; it comes to this node by itself.', g.master),
        SCHEMA = schema, TABLE = name;
END
$$;

CREATE OR REPLACE FUNCTION pmgsync.refuse_table(schema text, name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    fenced boolean;
BEGIN
    SELECT m.fenced INTO fenced FROM pmgsync.guard AS m;
    IF FOUND THEN
        PERFORM pmgsync.raise_closed(
            format(CASE WHEN fenced THEN 'the table %I.%I is closed' ELSE 'the table %I.%I is written' END, schema, name),
            schema, name);
    END IF;
END
$$;

-- While the lease holds nothing else need be read: it does not on a node that another master guards. The row in writer is
-- for those that write in that very instant, whose commit is checked against the row of the guard too.
CREATE OR REPLACE FUNCTION pmgsync.refuse() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    mine pg_catalog.text;
    place pg_catalog.tid;
BEGIN
    IF NOT pmgsync.lease_holds(pg_catalog.pg_sequence_last_value('pmgsync.lease')) THEN
        PERFORM pmgsync.refuse_table(tg_table_schema, tg_table_name);
    END IF;
    mine := pg_catalog.pg_current_xact_id();
    IF pg_catalog.split_part(pg_catalog.current_setting('pmgsync.writer', true), ' ', 1) OPERATOR(pg_catalog.=) mine THEN
        RETURN NULL;
    END IF;
    INSERT INTO pmgsync.writer (xid) VALUES (pg_catalog.pg_current_xact_id()) RETURNING ctid INTO place;
    -- Taken back with the row, should this happen below a savepoint.
    PERFORM pg_catalog.set_config('pmgsync.writer', pg_catalog.concat(mine, ' ', place), true);
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION pmgsync.refuse_commit() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    fenced boolean;
    place pg_catalog.tid := pg_catalog.split_part(pg_catalog.current_setting('pmgsync.writer', true), ' ', 2);
BEGIN
    SELECT m.fenced INTO fenced FROM pmgsync.guard AS m;
    IF FOUND AND NOT (fenced AND pmgsync.lease_holds(pg_catalog.pg_sequence_last_value('pmgsync.lease'))) THEN
        PERFORM pmgsync.raise_closed(
            CASE WHEN fenced THEN 'the transaction cannot be committed any more' ELSE 'what the transaction wrote is written' END,
            '', '');
    END IF;
    -- By its place: the table is mostly of dead rows.
    DELETE FROM pmgsync.writer AS w WHERE w.ctid OPERATOR(pg_catalog.=) place AND w.xid OPERATOR(pg_catalog.=) NEW.xid;
    RETURN NULL;
END
$$;

DROP TRIGGER IF EXISTS pmgsync_commit ON pmgsync.writer;
CREATE CONSTRAINT TRIGGER pmgsync_commit AFTER INSERT ON pmgsync.writer DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION pmgsync.refuse_commit();

-- The tables that are to be guarded, and partitioned ones whose rows are all in such: a statement on those does not fire
-- the triggers of their partitions.
CREATE OR REPLACE VIEW pmgsync.guardable AS
SELECT t.relation, t.schema, t.name FROM pmgsync.tables AS t
WHERE t.policy = 'mirror' AND NOT t.extension AND t.persistence = 'p'
UNION ALL
SELECT c.oid, n.nspname, c.relname
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind = 'p' AND c.relpersistence = 'p'
  AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pmgsync')
  AND (SELECT coalesce(pg_catalog.bool_and(coalesce(t.policy = 'mirror' AND NOT t.extension, false)),
                       (SELECT p.all_tables FROM pmgsync.profile AS p))
       FROM pg_catalog.pg_partition_tree(c.oid) AS leaf LEFT JOIN pmgsync.tables AS t ON t.relation = leaf.relid
       WHERE leaf.isleaf AND leaf.relid <> c.oid);

CREATE OR REPLACE FUNCTION pmgsync.guard_table(schema name, name name) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET pmgsync.internal = 'on' AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER pmgsync_guard BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON %I.%I '
                   'FOR EACH STATEMENT EXECUTE FUNCTION pmgsync.refuse()', schema, name);
END
$$;

-- Guards tables as they are created or change their name; what fails here is made good by the agent within seconds.
CREATE OR REPLACE FUNCTION pmgsync.guard_new() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET lock_timeout = '1s' AS $$
BEGIN
    PERFORM pmgsync.guard_table(g.schema, g.name)
    FROM (SELECT DISTINCT c.objid FROM pg_event_trigger_ddl_commands() AS c
          WHERE c.classid = 'pg_class'::regclass AND c.schema_name IS DISTINCT FROM 'pg_temp') AS made
    JOIN pmgsync.guardable AS g ON g.relation = made.objid
    WHERE EXISTS (SELECT FROM pmgsync.guard)
      AND NOT EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = g.relation AND t.tgname = 'pmgsync_guard');
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'pmgsync will look at this again: %', sqlerrm;
END
$$;
