-- The watch: keeps the publication complete while tables come, change and go, and sees to it that no UPDATE or DELETE of
-- an application fails because its table is published. Running it again changes nothing.
--
-- Inside somebody's DDL it only adds to pmgsync.replica_identity and reads nothing that is ever written by others: under
-- SERIALIZABLE anything else could end that transaction with an error it would not have had.
--
-- The functions set jit = off: where the server has it, compiling these queries made each CREATE TABLE of the application
-- take 70 ms instead of 6.

CREATE TABLE IF NOT EXISTS pmgsync.profile (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    all_tables boolean NOT NULL,
    ddl boolean NOT NULL
);

-- The tables that the profile names.
CREATE TABLE IF NOT EXISTS pmgsync.profile_table (
    schema name NOT NULL,
    name name NOT NULL,
    policy text NOT NULL,
    PRIMARY KEY (schema, name)
);

-- True when updates and deletes can be published by an index as replica identity. Before PostgreSQL 18 generated columns
-- are left out of what is sent, and with them what the row is found by.
CREATE OR REPLACE FUNCTION pmgsync.identifies(i pg_catalog.pg_index) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT i.indisvalid AND i.indislive AND i.indimmediate AND (
        current_setting('server_version_num')::integer >= 180000
        OR NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = i.indrelid AND a.attgenerated <> ''
                       AND a.attnum = ANY ((i.indkey::int2[])[:i.indnkeyatts - 1])))
$$;

-- Every table that holds rows, with what the profile and the catalog say of it. Usable: updates and deletes of it can be
-- published. A virtual generated column (PostgreSQL 18) cannot be part of a published replica identity. A transaction with
-- a snapshot from before the profile (REPEATABLE READ) does not see it: then every table may be published.
CREATE OR REPLACE VIEW pmgsync.tables AS
SELECT c.oid AS relation, n.oid AS namespace, n.nspname AS schema, c.relname AS name, c.relpersistence AS persistence,
       c.relreplident AS identity, t.policy, t.extension, t.virtual, t.usable,
       t.policy <> 'local' AND NOT t.extension AND c.relpersistence = 'p' AND (t.usable OR NOT t.virtual) AS wanted
FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pmgsync.profile AS p ON true
LEFT JOIN pmgsync.profile_table AS named ON named.schema = n.nspname AND named.name = c.relname
CROSS JOIN LATERAL (
    SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute AS a
                   WHERE a.attrelid = c.oid AND a.attgenerated = 'v' AND NOT a.attisdropped) AS virtual
) AS v
CROSS JOIN LATERAL (
    SELECT v.virtual,
           coalesce(named.policy, CASE WHEN p.all_tables IS NOT FALSE THEN 'mirror' ELSE 'local' END) AS policy,
           EXISTS (SELECT FROM pg_catalog.pg_depend AS d WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                   AND d.objid = c.oid AND d.deptype = 'e') AS extension,
           CASE c.relreplident WHEN 'f' THEN NOT v.virtual WHEN 'n' THEN false
           ELSE EXISTS (SELECT FROM pg_catalog.pg_index AS i
                        WHERE i.indrelid = c.oid AND pmgsync.identifies(i)
                          AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END)
           END AS usable
) AS t
WHERE c.relkind = 'r' AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pmgsync');

-- Schemas that are published as such. That needs no lock when a table is created, has the rows of CREATE TABLE AS, and
-- lets a table become unlogged; but every table of the schema is in.
CREATE OR REPLACE VIEW pmgsync.whole_schemas AS
SELECT n.oid AS namespace, n.nspname AS schema
FROM pg_catalog.pg_namespace AS n CROSS JOIN pmgsync.profile AS p
WHERE p.all_tables AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pmgsync')
  AND NOT EXISTS (SELECT FROM pmgsync.profile_table AS t WHERE t.schema = n.nspname AND t.policy = 'local')
  AND NOT EXISTS (SELECT FROM pmgsync.tables AS t
                  WHERE t.namespace = n.oid AND (t.extension OR (t.virtual AND NOT t.usable)));

-- Gives tables without a usable key REPLICA IDENTITY FULL: one table, or all. What they had before is kept for the day
-- that pmgsync leaves, and for when they get a key.
CREATE OR REPLACE FUNCTION pmgsync.keep_identity(one oid DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET pmgsync.internal = 'on' AS $$
DECLARE
    t record;
BEGIN
    FOR t IN
        SELECT w.relation, w.schema, w.name, w.identity,
               coalesce((SELECT x.relname FROM pg_index AS i JOIN pg_class AS x ON x.oid = i.indexrelid
                         WHERE i.indrelid = w.relation AND i.indisreplident), '') AS index
        FROM pmgsync.tables AS w
        WHERE w.wanted AND NOT w.usable AND (one IS NULL OR w.relation = one)
    LOOP
        EXECUTE format('ALTER TABLE ONLY %I.%I REPLICA IDENTITY FULL', t.schema, t.name);
        INSERT INTO pmgsync.replica_identity (schema, name, identity, index, relation)
        VALUES (t.schema, t.name, t.identity, t.index, t.relation);
    END LOOP;
END
$$;

-- Tells the other nodes to fetch tables whose content the stream does not have. Such a table came into the publication
-- later than it was made: SET LOGGED, a rename into the profile, CREATE TABLE AS where tables are published one by one, or
-- a lock that could not be had. It may hold rows that are in no stream. The message goes out with and without `ddl`.
CREATE OR REPLACE FUNCTION pmgsync.missing_content(relations oid[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tables json := (
        SELECT json_agg(json_build_object('schema', t.schema, 'name', t.name, 'oid', t.relation::bigint))
        FROM pmgsync.tables AS t WHERE t.relation = ANY (relations) AND t.wanted);
BEGIN
    IF tables IS NOT NULL THEN
        PERFORM pmgsync.emit('pmgsync.table', convert_to(
            json_build_object('tables', tables)::text, getdatabaseencoding()));
    END IF;
END
$$;

-- Makes the publication what the profile and the catalog say it should be. Late: tables that come in may hold rows already.
CREATE OR REPLACE FUNCTION pmgsync.publish(late boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET pmgsync.internal = 'on' AS $$
DECLARE
    publication oid := (SELECT p.oid FROM pg_publication AS p WHERE p.pubname = 'pmgsync');
    change record;
    filled oid[] := '{}';
BEGIN
    IF publication IS NULL THEN
        RETURN;
    END IF;
    FOR change IN
        WITH whole AS MATERIALIZED (SELECT w.namespace FROM pmgsync.whole_schemas AS w),
        listed AS MATERIALIZED (
            SELECT t.relation FROM pmgsync.tables AS t
            WHERE t.wanted AND t.namespace NOT IN (SELECT w.namespace FROM whole AS w)),
        has_tables AS (SELECT r.prrelid AS relation FROM pg_publication_rel AS r WHERE r.prpubid = publication),
        has_schemas AS (SELECT s.pnnspid AS namespace FROM pg_publication_namespace AS s WHERE s.pnpubid = publication),
        changes AS (
            SELECT 'ADD' AS verb, 'TABLE' AS kind, l.relation AS object FROM listed AS l
            WHERE l.relation NOT IN (SELECT h.relation FROM has_tables AS h)
            UNION ALL
            SELECT 'ADD', 'TABLES IN SCHEMA', w.namespace FROM whole AS w
            WHERE w.namespace NOT IN (SELECT h.namespace FROM has_schemas AS h)
            UNION ALL
            SELECT 'DROP', 'TABLE', h.relation FROM has_tables AS h
            WHERE h.relation NOT IN (SELECT l.relation FROM listed AS l)
            UNION ALL
            SELECT 'DROP', 'TABLES IN SCHEMA', h.namespace FROM has_schemas AS h
            WHERE h.namespace NOT IN (SELECT w.namespace FROM whole AS w))
        SELECT c.verb, c.kind,
               string_agg(CASE c.kind WHEN 'TABLE'
                          THEN (SELECT format('ONLY %I.%I', n.nspname, t.relname) FROM pg_class AS t
                                JOIN pg_namespace AS n ON n.oid = t.relnamespace WHERE t.oid = c.object)
                          ELSE (SELECT quote_ident(n.nspname) FROM pg_namespace AS n WHERE n.oid = c.object) END,
                          ', ') AS objects,
               array_agg(c.object) AS added
        FROM changes AS c GROUP BY c.verb, c.kind
        ORDER BY c.verb, c.kind  -- first ADD: at no moment is a table out that stays in
    LOOP
        EXECUTE format('ALTER PUBLICATION pmgsync %s %s %s', change.verb, change.kind, change.objects);
        IF late AND change.verb = 'ADD' THEN
            filled := filled || ARRAY(SELECT t.relation FROM pmgsync.tables AS t
                                      WHERE t.relation = ANY (change.added) OR t.namespace = ANY (change.added));
        END IF;
    END LOOP;
    PERFORM pmgsync.missing_content(filled);
END
$$;

-- Does so inside somebody's DDL. Whatever fails here must not undo the identities, by which published tables can be
-- written; another session that has just published the same is no failure.
CREATE OR REPLACE FUNCTION pmgsync.try_publish() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    FOR attempt IN 1..3 LOOP
        BEGIN
            PERFORM pmgsync.publish();
            RETURN;
        EXCEPTION WHEN duplicate_object OR undefined_object OR undefined_table OR invalid_schema_name THEN
            IF attempt = 3 THEN
                RAISE WARNING 'pmgsync will look at this again: %', sqlerrm;
            END IF;
        END;
    END LOOP;
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'pmgsync will look at this again: %', sqlerrm;
END
$$;

-- True when a table is in the publication and should not be, or the other way round. For one table: cheap.
CREATE OR REPLACE FUNCTION pmgsync.misplaced(one oid) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT t.wanted IS DISTINCT FROM (
               EXISTS (SELECT FROM pg_publication_rel AS r JOIN pg_publication AS p ON p.oid = r.prpubid
                       WHERE p.pubname = 'pmgsync' AND r.prrelid = t.relation)
            OR EXISTS (SELECT FROM pg_publication_namespace AS s JOIN pg_publication AS p ON p.oid = s.pnpubid
                       WHERE p.pubname = 'pmgsync' AND s.pnnspid = t.namespace))
    FROM pmgsync.tables AS t
    -- An unlogged table never is published, whatever the publication says.
    WHERE t.relation = one AND t.persistence = 'p'
$$;

-- Notes a table that is written anew because it becomes logged: its rows were in no stream. Reason 1: persistence.
CREATE OR REPLACE FUNCTION pmgsync.watch_rewrite() RETURNS event_trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    IF pg_event_trigger_table_rewrite_reason() & 1 = 1 THEN
        PERFORM set_config('pmgsync.relogged', concat_ws(
            ',', nullif(current_setting('pmgsync.relogged', true), ''), pg_event_trigger_table_rewrite_oid()), true);
    END IF;
END
$$;

-- The event triggers' function. Whatever goes wrong here is not the application's fault: its statement goes on, and the
-- agent tries again within seconds. It waits for a lock no longer than lock_timeout: only tables of schemas that are not
-- published as a whole, and new schemas, need one that others may hold.
CREATE OR REPLACE FUNCTION pmgsync.watch() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET lock_timeout = '1s' AS $$
DECLARE
    object record;
    publishing boolean := false;
    enters boolean;
    filled oid[] := coalesce(string_to_array(nullif(current_setting('pmgsync.relogged', true), ''), ','), '{}')::oid[];
BEGIN
    IF current_setting('pmgsync.maintaining', true) = 'on' THEN
        RETURN;
    END IF;
    IF tg_event = 'sql_drop' THEN
        -- With an index or a column a key may be gone. The locks of this transaction say which tables that are. Looking at
        -- all tables would lock, and perhaps alter, those of others in somebody's DDL.
        IF EXISTS (SELECT FROM pg_event_trigger_dropped_objects() AS d
                   WHERE d.object_type IN ('index', 'table constraint', 'table column') AND NOT d.is_temporary) THEN
            FOR object IN
                SELECT DISTINCT l.relation FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
                WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND c.relkind = 'r'
                  AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
                  AND l.mode IN ('AccessExclusiveLock', 'ShareUpdateExclusiveLock')
            LOOP
                PERFORM pmgsync.keep_identity(object.relation);
            END LOOP;
            IF EXISTS (SELECT FROM pmgsync.tables AS t WHERE t.virtual AND NOT t.usable) THEN
                PERFORM pmgsync.try_publish();
            END IF;
        END IF;
        RETURN;
    END IF;
    FOR object IN
        SELECT DISTINCT c.classid, c.objid FROM pg_event_trigger_ddl_commands() AS c
        WHERE c.schema_name IS DISTINCT FROM 'pg_temp'
          AND c.classid IN ('pg_class'::regclass, 'pg_namespace'::regclass, 'pg_extension'::regclass)
    LOOP
        IF object.classid = 'pg_class'::regclass THEN
            PERFORM pmgsync.keep_identity(object.objid);
            enters := coalesce(pmgsync.misplaced(object.objid), false);
            publishing := publishing OR enters;
            -- What a table that is new to the publication holds already is in no stream.
            IF enters AND tg_tag <> 'CREATE TABLE'
                AND current_setting('pmgsync.internal', true) IS DISTINCT FROM 'on' THEN
                filled := filled || object.objid;
            END IF;
        ELSE
            publishing := publishing OR EXISTS (SELECT FROM pmgsync.profile AS p WHERE p.all_tables);
        END IF;
    END LOOP;
    IF publishing THEN
        PERFORM pmgsync.try_publish();
    END IF;
    PERFORM set_config('pmgsync.relogged', '', true), pmgsync.missing_content(filled);
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'pmgsync will look at this again: %', sqlerrm;
END
$$;

-- What the agent does every few seconds: all of the above for all tables, and what would be too much inside somebody's
-- DDL: records of tables that are gone go, and a table that was given a key uses it.
CREATE OR REPLACE FUNCTION pmgsync.maintain() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    t record;
BEGIN
    -- All tables are looked at here, not again for each that is altered.
    PERFORM set_config('pmgsync.maintaining', 'on', true);
    -- Copied from another node by name.
    UPDATE pmgsync.replica_identity AS r SET relation = c.oid
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE r.relation IS NULL AND n.nspname = r.schema AND c.relname = r.name AND c.relkind = 'r';
    DELETE FROM pmgsync.replica_identity AS r
    WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = r.relation AND c.relreplident = 'f');
    -- The first record says what the table had before pmgsync.
    DELETE FROM pmgsync.replica_identity AS r
    WHERE EXISTS (SELECT FROM pmgsync.replica_identity AS e WHERE e.relation = r.relation
                  AND (e.noticed, e.ctid) < (r.noticed, r.ctid));
    FOR t IN
        SELECT w.schema, w.name FROM pmgsync.tables AS w JOIN pmgsync.replica_identity AS r ON r.relation = w.relation
        WHERE w.identity = 'f' AND r.identity = 'd'
          AND EXISTS (SELECT FROM pg_index AS i
                      WHERE i.indrelid = w.relation AND i.indisprimary AND pmgsync.identifies(i))
    LOOP
        EXECUTE format('ALTER TABLE ONLY %I.%I REPLICA IDENTITY DEFAULT', t.schema, t.name);
    END LOOP;
    PERFORM pmgsync.keep_identity();
    PERFORM pmgsync.publish(late => true);
    PERFORM set_config('pmgsync.maintaining', 'off', true);
END
$$;
