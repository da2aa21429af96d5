-- Logical messages of pmgsync's own. Every session may write messages under any prefix, so those that count are sealed with
-- a key that only superusers can read; capture drops what is not. Running it again changes nothing.

-- Two keys of a block of SHA-256 each: sha256(outer || sha256(inner || message)) is HMAC with independent pads (NMAC).
CREATE TABLE IF NOT EXISTS pmgsync.seal_key (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    inner_key bytea NOT NULL,
    outer_key bytea NOT NULL
);
REVOKE ALL ON pmgsync.seal_key FROM PUBLIC;
INSERT INTO pmgsync.seal_key (inner_key, outer_key)
SELECT pg_catalog.string_agg(uuid_send(gen_random_uuid()), '') FILTER (WHERE n <= 4),
       pg_catalog.string_agg(uuid_send(gen_random_uuid()), '') FILTER (WHERE n > 4)
FROM pg_catalog.generate_series(1, 8) AS n
ON CONFLICT DO NOTHING;

-- Not SECURITY DEFINER: it works for those who can read the key.
--
-- An empty message follows each one. Decoding orders a message by where its record ends and a row by where it begins. When
-- the two are in different subtransactions (a savepoint; an exception block, as in every event trigger's function) and
-- next to each other, both places are the same, and the row that depends on the change may come first: seen on 15 and 18.
CREATE OR REPLACE FUNCTION pmgsync.emit(prefix text, content bytea) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_logical_emit_message(
        true, prefix,
        sha256(k.outer_key || sha256(k.inner_key || convert_to(prefix, 'SQL_ASCII') || '\x00'::bytea || content))
        || content)
    FROM pmgsync.seal_key AS k;
    -- This record keeps the message apart from a row that comes next.
    PERFORM pg_logical_emit_message(true, 'pmgsync', '');
END
$$;
