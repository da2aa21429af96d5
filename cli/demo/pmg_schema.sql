-- The tables of a mail gateway, as the demo and the tests use them. The database is SQL_ASCII with collation C.
-- cmsreceivers and creceivers have no key, as on a gateway.

CREATE TABLE public.rule (
    id serial PRIMARY KEY,
    name varchar(255),
    priority integer NOT NULL,
    active integer NOT NULL DEFAULT 0,
    direction integer NOT NULL DEFAULT 2,
    count integer NOT NULL DEFAULT 0
);

CREATE TABLE public.rulegroup (
    objectgroup_id integer NOT NULL,
    rule_id integer NOT NULL,
    grouptype integer NOT NULL,
    PRIMARY KEY (objectgroup_id, rule_id, grouptype)
);

CREATE TABLE public.objectgroup (
    id serial PRIMARY KEY,
    name varchar(255) NOT NULL,
    info varchar(255),
    class varchar(10) NOT NULL
);

CREATE TABLE public.object (
    id serial PRIMARY KEY,
    objecttype integer NOT NULL,
    objectgroup_id integer NOT NULL,
    value bytea
);

CREATE TABLE public.attribut (
    object_id integer NOT NULL,
    name varchar(20) NOT NULL,
    value bytea,
    PRIMARY KEY (object_id, name)
);

CREATE TABLE public.rule_attributes (
    rule_id integer NOT NULL REFERENCES public.rule (id) ON DELETE CASCADE,
    name varchar(20) NOT NULL,
    value bytea,
    PRIMARY KEY (rule_id, name)
);

CREATE TABLE public.objectgroup_attributes (
    objectgroup_id integer NOT NULL REFERENCES public.objectgroup (id) ON DELETE CASCADE,
    name varchar(20) NOT NULL,
    value bytea,
    PRIMARY KEY (objectgroup_id, name)
);

CREATE TABLE public.cmailstore (
    cid integer NOT NULL DEFAULT 0,
    rid integer NOT NULL,
    id serial UNIQUE,
    time integer NOT NULL,
    qtype "char" NOT NULL,
    bytes integer NOT NULL,
    spamlevel integer NOT NULL,
    info varchar,
    sender varchar(255) NOT NULL,
    header varchar NOT NULL,
    file varchar(255) NOT NULL,
    PRIMARY KEY (cid, rid)
);
CREATE INDEX cmailstore_time ON public.cmailstore (time);

CREATE TABLE public.cmsreceivers (
    cmailstore_cid integer NOT NULL,
    cmailstore_rid integer NOT NULL,
    pmail varchar(255) NOT NULL,
    receiver varchar(255),
    ticketid integer NOT NULL,
    status "char" NOT NULL,
    seen "char" NOT NULL DEFAULT 'N',
    seenmtime integer NOT NULL DEFAULT 0,
    mtime integer NOT NULL
);
CREATE INDEX cmsreceivers_mail ON public.cmsreceivers (cmailstore_cid, cmailstore_rid);
CREATE INDEX cmsreceivers_mtime ON public.cmsreceivers (mtime);

CREATE TABLE public.cstatistic (
    cid integer NOT NULL DEFAULT 0,
    rid integer NOT NULL,
    id serial UNIQUE,
    time integer NOT NULL,
    bytes integer NOT NULL,
    direction boolean NOT NULL,
    spamlevel integer NOT NULL,
    virusinfo varchar(255),
    ptime integer NOT NULL,
    sender varchar(255) NOT NULL,
    PRIMARY KEY (cid, rid)
);
CREATE INDEX cstatistic_time ON public.cstatistic (time);

CREATE TABLE public.creceivers (
    cstatistic_cid integer NOT NULL,
    cstatistic_rid integer NOT NULL,
    receiver varchar(255) NOT NULL,
    blocked boolean NOT NULL
);
CREATE INDEX creceivers_mail ON public.creceivers (cstatistic_cid, cstatistic_rid);

CREATE TABLE public.cgreylist (
    ipnet varchar(49) NOT NULL,
    sender varchar(255) NOT NULL,
    receiver varchar(255) NOT NULL,
    instance varchar(255),
    rctime integer NOT NULL,
    extime integer NOT NULL,
    delay integer NOT NULL DEFAULT 0,
    blocked integer NOT NULL,
    passed integer NOT NULL,
    cid integer NOT NULL,
    mtime integer NOT NULL,
    PRIMARY KEY (ipnet, sender, receiver)
);
CREATE INDEX cgreylist_instance ON public.cgreylist (instance, sender);
CREATE INDEX cgreylist_extime ON public.cgreylist (extime);
CREATE INDEX cgreylist_mtime ON public.cgreylist (mtime);

CREATE TABLE public.userprefs (
    pmail varchar,
    name varchar(255),
    data varchar,
    mtime integer NOT NULL,
    PRIMARY KEY (pmail, name)
);
CREATE INDEX userprefs_mtime ON public.userprefs (mtime);

CREATE TABLE public.localstat (
    time integer NOT NULL,
    rblcount integer NOT NULL DEFAULT 0,
    pregreetcount integer NOT NULL DEFAULT 0,
    cid integer NOT NULL,
    mtime integer NOT NULL,
    PRIMARY KEY (time, cid)
);
CREATE INDEX localstat_mtime ON public.localstat (mtime);

CREATE TABLE public.dailystat (
    time integer PRIMARY KEY,
    count_in integer NOT NULL DEFAULT 0,
    count_out integer NOT NULL DEFAULT 0,
    bytes_in bigint NOT NULL DEFAULT 0,
    bytes_out bigint NOT NULL DEFAULT 0,
    virus_in integer NOT NULL DEFAULT 0,
    virus_out integer NOT NULL DEFAULT 0,
    spam_in integer NOT NULL DEFAULT 0,
    spam_out integer NOT NULL DEFAULT 0,
    mtime integer NOT NULL
);
CREATE INDEX dailystat_mtime ON public.dailystat (mtime);

CREATE TABLE public.domainstat (
    time integer NOT NULL,
    domain varchar(255) NOT NULL,
    count_in integer NOT NULL DEFAULT 0,
    count_out integer NOT NULL DEFAULT 0,
    bytes_in bigint NOT NULL DEFAULT 0,
    bytes_out bigint NOT NULL DEFAULT 0,
    mtime integer NOT NULL,
    PRIMARY KEY (time, domain)
);
CREATE INDEX domainstat_mtime ON public.domainstat (mtime);

CREATE TABLE public.virusinfo (
    time integer NOT NULL,
    name varchar(255) NOT NULL,
    count integer NOT NULL DEFAULT 0,
    mtime integer NOT NULL,
    PRIMARY KEY (time, name)
);
CREATE INDEX virusinfo_mtime ON public.virusinfo (mtime);

CREATE TABLE public.clusterinfo (
    cid integer NOT NULL,
    name varchar NOT NULL,
    ivalue integer,
    svalue varchar,
    PRIMARY KEY (cid, name)
);

CREATE TABLE public.statinfo (
    name varchar(255) PRIMARY KEY,
    ivalue integer,
    svalue varchar(255)
);
