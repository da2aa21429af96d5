-- What pmgsync keeps in the database about its own node. Idempotent: it runs at every `create` and `join`.

CREATE SCHEMA IF NOT EXISTS pmgsync;
COMMENT ON SCHEMA pmgsync IS 'state of pmgsync; removed with the node';

-- One row. It is complete when start_lsn is there; without it, provisioning was interrupted and is undone by the next.
CREATE TABLE IF NOT EXISTS pmgsync.node (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    cid integer NOT NULL CHECK (cid > 0),
    cluster bytea NOT NULL,
    incarnation bigint NOT NULL CHECK (incarnation > 0),
    start_lsn pg_catalog.pg_lsn,
    needs_snapshot boolean NOT NULL,
    system_id text NOT NULL,
    timeline integer NOT NULL,
    slot text NOT NULL,
    publication text NOT NULL,
    profile_digest text NOT NULL
);
COMMENT ON COLUMN pmgsync.node.start_lsn IS
    'consistent point of the slot: transactions that committed at or after it are in this incarnation of the chain';
COMMENT ON COLUMN pmgsync.node.needs_snapshot IS
    'true: who does not know this incarnation needs a snapshot; false: it starts from the state of the cluster';

-- Tables that were given REPLICA IDENTITY FULL because they have no usable key, and what they had before; the first
-- record of a table counts. No key: it is written inside somebody's DDL, and must never make that wait or fail.
CREATE TABLE IF NOT EXISTS pmgsync.replica_identity (
    schema name NOT NULL,
    name name NOT NULL,
    identity "char" NOT NULL,
    index name NOT NULL DEFAULT '',
    relation oid,
    noticed timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
