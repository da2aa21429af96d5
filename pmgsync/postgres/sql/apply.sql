-- What applying needs in every member's database. Running it again changes nothing.

CREATE SCHEMA IF NOT EXISTS pmgsync;

-- The node's state vector: how far it is on each origin's chain. Written by the transaction that applies the changes.
-- Incarnation 0: the origin was removed from the cluster, and its chain is over here.
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

-- The newest changes of the schema that could not be repeated here. Deleted by whoever has put it right.
CREATE TABLE IF NOT EXISTS pmgsync.schema_failure (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    noticed timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    origin integer NOT NULL,
    lsn pg_lsn NOT NULL,
    change text NOT NULL,
    statement text NOT NULL,
    error text NOT NULL
);

-- The newest conflicts: values of an origin's that were not taken because a rule prefers those that were here.
CREATE TABLE IF NOT EXISTS pmgsync.conflict (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    noticed timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    origin integer NOT NULL,
    schema name NOT NULL,
    name name NOT NULL,
    row_key text[] NOT NULL,
    column_name text NOT NULL,
    rule text NOT NULL,
    lost text
);
CREATE INDEX IF NOT EXISTS conflict_origin ON pmgsync.conflict (origin, id);

-- Merged rows that are now another than the origin sent: it may not know the better values, so they are published again.
CREATE TABLE IF NOT EXISTS pmgsync.repair (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    noticed timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    origin integer NOT NULL,
    schema name NOT NULL,
    name name NOT NULL,
    keys name[] NOT NULL,
    row_key text[] NOT NULL
);
CREATE INDEX IF NOT EXISTS repair_origin ON pmgsync.repair (origin, id);

-- Called for a merged row that is another than the origin sent; "what" is a number of the session's own.
CREATE OR REPLACE FUNCTION pmgsync.merged(
    what integer, origin integer, schema name, name name, keys name[], row_key text[],
    columns text[], rules text[], lost boolean[], given text[]
) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    losers text := (SELECT string_agg(u.col, ',') FROM unnest(columns, lost) AS u (col, lost) WHERE u.lost);
BEGIN
    INSERT INTO pmgsync.repair (origin, schema, name, keys, row_key) VALUES ($2, $3, $4, $5, $6);
    IF losers IS NOT NULL THEN
        INSERT INTO pmgsync.conflict (origin, schema, name, row_key, column_name, rule, lost)
        SELECT $2, $3, $4, $6, u.col, u.rule, pg_catalog.left(u.given, 200)
        FROM unnest(columns, rules, lost, given) AS u (col, rule, lost, given) WHERE u.lost;
        RAISE NOTICE 'pmgsync lost % %', what, losers;
    END IF;
END
$$;

-- Publishes rows again as they are here now: updates that change nothing. Not to be run in an origin's session. Values
-- of these types are made anew, for what is stored out of line is only published when it is another.
CREATE OR REPLACE FUNCTION pmgsync.republish(whose integer, most integer) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    r record;
    sets text;
    finds text;
    rows integer := 0;
BEGIN
    FOR r IN
        WITH taken AS (
            DELETE FROM pmgsync.repair AS p WHERE p.id IN (
                SELECT o.id FROM pmgsync.repair AS o
                WHERE o.origin = whose AND o.noticed < clock_timestamp() - interval '1 s' ORDER BY o.id LIMIT most)
            RETURNING p.*)
        SELECT DISTINCT t.schema, t.name, t.keys, t.row_key FROM taken AS t ORDER BY 1, 2, 4
    LOOP
        SELECT string_agg(format('%1$I = %1$I || %2$L', a.attname, ''), ', ') INTO sets
        FROM pg_attribute AS a WHERE a.attrelid = to_regclass(format('%I.%I', r.schema, r.name)) AND a.attnum > 0
          AND a.atttypid IN ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype)
          AND NOT a.attisdropped AND a.attgenerated = '' AND a.attname <> ALL (r.keys);
        SELECT string_agg(CASE WHEN k.value IS NULL THEN format('%I IS NOT DISTINCT FROM NULL', k.name)
                               ELSE format('%I = %L', k.name, k.value) END, ' AND ')
        INTO finds FROM unnest(r.keys, r.row_key) AS k (name, value);
        BEGIN
            EXECUTE format('UPDATE %I.%I SET %s WHERE %s', r.schema, r.name,
                           coalesce(sets, format('%1$I = %1$I', r.keys[1])), finds);
            rows := rows + 1;
        EXCEPTION WHEN undefined_table OR undefined_column THEN
            NULL;  -- another table by now; it is fetched anew
        END;
    END LOOP;
    RETURN rows;
END
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
