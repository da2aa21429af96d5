-- Changes of the schema that travel: event triggers write them into the stream, in their place among the rows. Running it
-- again changes nothing. Whatever goes wrong here is not the application's fault: its statement goes on.
--
-- The triggers are not made ALWAYS: what is applied from the stream under session_replication_role = replica is not sent on.

-- What of a table must be the same where a change was repeated; text that is equal for equal tables. The values that rows
-- without a column have show a default that came out differently (ADD COLUMN ... DEFAULT now()).
CREATE OR REPLACE FUNCTION pmgsync.shape(one oid) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO' SET intervalstyle = 'postgres'
SET extra_float_digits = 3 SET bytea_output = 'hex' AS $$
    SELECT coalesce(string_agg(
        concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                  a.attgenerated, pg_get_expr(d.adbin, d.adrelid), a.attmissingval::text),
        ', ' ORDER BY a.attname::text COLLATE "C"), '')
    FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = one AND a.attnum > 0 AND NOT a.attisdropped
$$;

-- The table that an object is part of, NULL for one that is part of none.
CREATE OR REPLACE FUNCTION pmgsync.table_of(class oid, object oid) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE class
        WHEN 'pg_class'::regclass THEN (
            SELECT CASE c.relkind WHEN 'r' THEN c.oid WHEN 'p' THEN c.oid
                   WHEN 'i' THEN (SELECT i.indrelid FROM pg_index AS i WHERE i.indexrelid = c.oid)
                   WHEN 'I' THEN (SELECT i.indrelid FROM pg_index AS i WHERE i.indexrelid = c.oid)
                   WHEN 'S' THEN (SELECT d.refobjid FROM pg_depend AS d
                                  WHERE d.classid = class AND d.objid = c.oid AND d.refclassid = class
                                    AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')) END
            FROM pg_class AS c WHERE c.oid = object)
        WHEN 'pg_trigger'::regclass THEN (SELECT t.tgrelid FROM pg_trigger AS t WHERE t.oid = object)
        WHEN 'pg_policy'::regclass THEN (SELECT p.polrelid FROM pg_policy AS p WHERE p.oid = object)
        WHEN 'pg_rewrite'::regclass THEN (SELECT r.ev_class FROM pg_rewrite AS r WHERE r.oid = object)
        WHEN 'pg_constraint'::regclass THEN (SELECT nullif(c.conrelid, 0) FROM pg_constraint AS c WHERE c.oid = object)
    END
$$;

-- True for a table that the profile keeps out of the stream by name.
CREATE OR REPLACE FUNCTION pmgsync.is_local(schema name, name name) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pmgsync.profile_table AS t
                   WHERE t.schema = is_local.schema AND t.name = is_local.name AND t.policy = 'local')
$$;

-- Fires as the caller, to note who that is and where names are looked for. The search path is the caller's, too, so every
-- name here is written in full.
CREATE OR REPLACE FUNCTION pmgsync.ddl_caller() RETURNS event_trigger
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.set_config('pmgsync.caller', pg_catalog.json_build_object(
        'role', current_user,
        'path', pg_catalog.current_schemas(false),
        'settings', pg_catalog.json_build_object(
            'datestyle', pg_catalog.current_setting('datestyle'),
            'intervalstyle', pg_catalog.current_setting('intervalstyle'),
            'timezone', pg_catalog.current_setting('timezone'),
            'lc_monetary', pg_catalog.current_setting('lc_monetary'),
            'xmloption', pg_catalog.current_setting('xmloption'),
            'standard_conforming_strings', pg_catalog.current_setting('standard_conforming_strings'))
        )::pg_catalog.text, true);
END
$$;

-- Notes the tables that a statement writes anew: what their rows become need not be the same on another node.
CREATE OR REPLACE FUNCTION pmgsync.ddl_rewrite() RETURNS event_trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    PERFORM set_config('pmgsync.rewritten', concat_ws(
        ',', nullif(current_setting('pmgsync.rewritten', true), ''), pg_event_trigger_table_rewrite_oid()), true);
END
$$;

-- Notes what a statement drops; what is gone can only be asked for now.
CREATE OR REPLACE FUNCTION pmgsync.ddl_dropped() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    PERFORM set_config('pmgsync.dropped', coalesce((
        SELECT json_agg(json_build_object('type', d.object_type, 'schema', d.schema_name, 'name', d.object_name,
                                          'identity', d.object_identity))::text
        FROM pg_event_trigger_dropped_objects() AS d
        WHERE NOT d.is_temporary AND (d.original OR d.object_type = 'table')
          AND d.schema_name IS DISTINCT FROM 'pmgsync'
          AND NOT (d.object_type = 'trigger' AND d.object_identity LIKE 'pmgsync\_guard on %')
          AND NOT (d.object_type ~ '^(table|trigger|rule|policy)'
                   AND pmgsync.is_local(d.address_names[1]::name, d.address_names[2]::name))), ''), true);
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'pmgsync cannot carry this change of the schema to the other nodes: %', sqlerrm;
END
$$;

-- Writes a statement into the stream. What its text is: for a statement that was sent by itself, or among others in one
-- string, the whole string and which of its statements have come so far; for one that PL/pgSQL executes, what the call stack
-- says. For others the text is not known, and the nodes that receive it say so.
CREATE OR REPLACE FUNCTION pmgsync.ddl_publish() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET lc_messages = 'C' AS $$
DECLARE
    most CONSTANT integer := 1048576;
    stack text;
    mark text := extract(epoch FROM statement_timestamp())::text;
    tags text;
    dropped json := coalesce(nullif(current_setting('pmgsync.dropped', true), ''), '[]')::json;
    rewritten oid[] := coalesce(string_to_array(nullif(current_setting('pmgsync.rewritten', true), ''), ','), '{}')::oid[];
    query text := current_query();
    statement text;
    found record;
    content text;
BEGIN
    PERFORM set_config('pmgsync.dropped', '', true), set_config('pmgsync.rewritten', '', true);
    GET DIAGNOSTICS stack = PG_CONTEXT;
    stack := substr(stack, strpos(stack || E'\n', E'\n') + 1);
    IF current_setting('pmgsync.internal', true) = 'on' THEN
        RETURN;
    END IF;
    IF stack = '' THEN
        tags := coalesce(current_setting('pmgsync.ddl_tags', true), '');
        tags := CASE split_part(tags, ';', 1) WHEN mark THEN tags || ',' ELSE mark || ';' END || tg_tag;
        PERFORM set_config('pmgsync.ddl_tags', tags, false);
    ELSIF starts_with(stack, 'SQL statement "') AND strpos(stack, E'"\nPL/pgSQL function ') > 0 THEN
        statement := substr(stack, 16, strpos(stack, E'"\nPL/pgSQL function ') - 16);
    END IF;
    -- A database has publications and subscriptions of its own; indexes are rebuilt where they are broken.
    IF tg_tag ~ 'PUBLICATION|SUBSCRIPTION|^REINDEX' THEN
        RETURN;
    END IF;

    WITH RECURSIVE objects AS (
        SELECT DISTINCT c.object_type AS type, c.object_identity AS identity, c.classid, c.objid,
               pmgsync.table_of(c.classid, c.objid) AS relation
        FROM pg_event_trigger_ddl_commands() AS c
        WHERE NOT c.in_extension AND coalesce(c.schema_name, '') NOT IN ('pg_temp', 'pmgsync')),
    kept AS (
        SELECT o.* FROM objects AS o LEFT JOIN pg_class AS c ON c.oid = o.relation
        LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.oid IS NULL OR (c.relpersistence <> 't' AND n.nspname <> 'pmgsync'
                                AND NOT pmgsync.is_local(n.nspname, c.relname))),
    -- A change of a table is one of its partitions and children, too.
    related AS (
        SELECT k.relation FROM kept AS k WHERE k.relation IS NOT NULL
        UNION
        SELECT i.inhrelid FROM related AS r JOIN pg_inherits AS i ON i.inhparent = r.relation),
    tables AS (
        SELECT c.oid, n.nspname AS schema, c.relname AS name, pmgsync.shape(c.oid) AS shape, c.oid = ANY (rewritten) AS rewritten
        FROM related AS r JOIN pg_class AS c ON c.oid = r.relation AND c.relkind IN ('r', 'p')
        JOIN pg_namespace AS n ON n.oid = c.relnamespace)
    SELECT (SELECT count(*) FROM kept) AS objects,
           EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS c WHERE c.in_extension) AS in_extension,
           (SELECT coalesce(json_agg(DISTINCT k.type || ' ' || k.identity), '[]') FROM kept AS k
            WHERE k.identity IS NOT NULL) AS identities,
           (SELECT coalesce(json_agg(t), '[]') FROM tables AS t) AS tables,
           (SELECT min(k.relation) FROM kept AS k WHERE k.type = 'table') AS made
    INTO found;
    IF found.in_extension AND tg_tag NOT IN ('CREATE EXTENSION', 'ALTER EXTENSION') THEN
        RETURN;
    END IF;
    -- Nothing came of it (IF NOT EXISTS), or only temporary or local objects. What GRANT is about is not told.
    IF found.objects = 0 AND json_array_length(dropped) = 0
        AND tg_tag NOT IN ('GRANT', 'REVOKE', 'ALTER DEFAULT PRIVILEGES') THEN
        RETURN;
    END IF;
    IF tg_tag IN ('CREATE TABLE AS', 'SELECT INTO') THEN
        -- The query is not run again elsewhere: its rows come by themselves.
        SELECT format('CREATE %s TABLE %I.%I (%s)', CASE c.relpersistence WHEN 'u' THEN 'UNLOGGED' ELSE '' END,
                      n.nspname, c.relname, string_agg(
                          quote_ident(a.attname) || ' ' || format_type(a.atttypid, a.atttypmod)
                          || CASE WHEN a.attcollation <> t.typcollation
                             THEN format(' COLLATE %I.%I', cn.nspname, co.collname) ELSE '' END, ', ' ORDER BY a.attnum))
        INTO statement
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        LEFT JOIN (pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
                   LEFT JOIN pg_collation AS co ON co.oid = a.attcollation
                   LEFT JOIN pg_namespace AS cn ON cn.oid = co.collnamespace)
             ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.oid = found.made GROUP BY c.oid, n.oid, c.relname, c.relpersistence, n.nspname;
    END IF;
    content := json_build_object(
        'tag', tg_tag,
        'caller', current_setting('pmgsync.caller')::json,
        'statement', CASE WHEN octet_length(statement) <= most THEN statement END,
        'query', CASE WHEN statement IS NULL AND stack = '' AND octet_length(query) <= most THEN query END,
        'tags', string_to_array(split_part(tags, ';', 2), ','),
        'objects', found.identities,
        'dropped', dropped,
        'tables', found.tables)::text;
    PERFORM pmgsync.emit('pmgsync.schema', convert_to(content, getdatabaseencoding()));
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'pmgsync cannot carry this change of the schema to the other nodes: %', sqlerrm;
END
$$;
