-- The guard: on nodes that are not the master it refuses to write tables that the master writes. Running it again
-- changes nothing. Triggers do not fire under session_replication_role = replica: applying is not refused.

-- One row on a node that is guarded, none on the master: removing it opens every table at once.
CREATE TABLE IF NOT EXISTS pmgsync.guard (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    master text NOT NULL,
    address text NOT NULL
);

CREATE OR REPLACE FUNCTION pmgsync.refuse() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    g record;
BEGIN
    SELECT m.master, m.address INTO g FROM pmgsync.guard AS m;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
            MESSAGE = format('the table %I.%I is written by the master of the cluster alone, %s (%s)',
                             tg_table_schema, tg_table_name, g.master, g.address),
            HINT = format('Make this change on %s; it comes to this node by itself.', g.master),
            SCHEMA = tg_table_schema, TABLE = tg_table_name;
    END IF;
    RETURN NULL;
END
$$;

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
