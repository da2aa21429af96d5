# ruff: noqa: E501 -- a line is a group of values
"""Values of every type that a column can have, as texts that PostgreSQL reads; extremes, and what looks like syntax."""

from __future__ import annotations

TRICKY = (
    "", " ", "x", "NULL", "null", "\\N", "\\n", "\\.", "\\", "\\\\", "\\t", "\\x41", "\\u0041", "{}", "{NULL}", '""', '"', "''", "'",
    "'; DROP TABLE x; --", "()", "(,)", "[]", ",", "\n", "\r", "\r\n", "\t", "\v\f\b\a", "a\nb", "line\n\\.\nline", "$1", "$$",
    "$x$", "%s", "%", "%%", "%(a)s", ":name", "?", "é", "☃", "𝄞", "e\u0301", "\u202e", "\ufeff", "\x01", "\x7f", " x ", "E'\\n'",
    b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\\xff'", b"a\x80b", "x" * 5000,
)  # fmt: skip
_DIGITS = "1234567890" * 100

VALUES: dict[str, tuple[str | bytes, ...]] = {
    "boolean": ("t", "f"),
    "smallint": ("-32768", "0", "32767"),
    "integer": ("-2147483648", "0", "2147483647"),
    "bigint": ("-9223372036854775808", "0", "9223372036854775807"),
    "numeric": (
        "NaN", "Infinity", "-Infinity", "0", "0.00", "-0", "1.0", "1.00", _DIGITS, f"-{_DIGITS}.{_DIGITS}",
        f"0.{'0' * 999}1", "1e131071", "1e-16383",
    ),
    "real": (
        "NaN", "Infinity", "-Infinity", "0", "-0", "1e-45", "-1e-45", "1.17549435e-38", "3.4028235e38", "0.1", "16777217",
    ),
    "double precision": (
        "NaN", "Infinity", "-Infinity", "0", "-0", "5e-324", "-5e-324", "2.2250738585072014e-308",
        "1.7976931348623157e308", "0.1", "0.30000000000000004", "123456789012345680",
    ),
    "money": ("-92233720368547758.08", "92233720368547758.07", "0", "$1,000.50", "-0.01"),
    "text": TRICKY,
    "character varying": TRICKY,
    "bpchar": TRICKY,
    "name": (*(value for value in TRICKY if len(value) < 64), "n" * 63),
    '"char"': ("", "a", "\\", "'", '"', ",", "{", "\n", "\\200", "\\377", "\\001", b"\xfe"),
    "refcursor": TRICKY[:30],
    "bytea": ("", "\\x00", "\\x" + bytes(range(256)).hex(), "\\x" + bytes(range(255, -1, -1)).hex() * 8, "\\x5c78"),
    "date": ("infinity", "-infinity", "4713-01-01 BC", "5874897-12-31", "2000-01-01", "0001-12-31 BC", "2024-02-29"),
    "time without time zone": ("00:00:00", "24:00:00", "23:59:59.999999", "00:00:00.000001"),
    "time with time zone": ("24:00:00-15:59", "00:00:00+15:59", "12:00:00.000001+05:30:15", "00:00+00"),
    "timestamp without time zone": (
        "infinity", "-infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999", "2000-01-01",
        "1999-12-31 23:59:59.999999", "0001-12-31 23:59:59 BC",
    ),
    "timestamp with time zone": (
        "infinity", "-infinity", "4713-01-01 00:00:00+00 BC", "294276-12-31 23:59:59.999999+00", "2000-01-01+15:59",
        "2024-03-31 02:30:00 Europe/Berlin", "1883-11-18 12:03:57 America/New_York",
    ),
    "interval": (
        "178000000 years", "-178000000 years", "0", "1 mon -1 day +00:00:00.000001", "-1 year -2 mons +3 days -04:05:06.789",
        "2147483647 hours", "-2147483648 days", "1 day", "24 hours",
    ),
    '"bit"': ("0", "1"),
    "bit varying": ("", "0", "1", "01" * 500),
    "inet": ("0.0.0.0/0", "::/0", "10.1.2.3/8", "::ffff:1.2.3.4/128", "192.168.0.1", "192.168.0.1/32", "fe80::1/64"),
    "cidr": ("0.0.0.0/0", "::/0", "10.0.0.0/8", "1.2.3.4/32", "2001:db8::/32"),
    "macaddr": ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "08:00:2b:01:02:03"),
    "macaddr8": ("00:00:00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff:ff:ff", "08:00:2b:01:02:03:04:05"),
    "json": (
        "null", ' [1,2 ]\n', '{"a": 1, "a":  2}', '"\\u0000"', "1e1000", '"\\\\N\\t"', '{"": ""}', '"é☃"', "[" * 500 + "]" * 500,
        '"$1 %s \'"', "-0.00",
    ),
    "jsonb": (
        "null", "[1, 2]", '{"b": 1, "a": 2, "a": 3}', "1.10", "1e400", '"\\\\N\\t\\""', '{"": ""}', '"é☃"', "{}", "[]", "-0.00",
        "[" * 500 + "]" * 500, '"\\u0041"',
    ),
    "jsonpath": ("$", "strict $.a", 'lax $."a b"[*] ? (@.x > 1 && @.y like_regex "^\\\\d+$" flag "i")', '"\\n\\\\"', "1.10"),
    "xml": (
        "", "text", "<a/>", "<a b='1'>&lt;&amp;é</a>", "<a><![CDATA[ ]] \\N ]]></a><b/>", "<!-- \\. -->",
        '<?xml version="1.0" standalone="yes"?><a>\n</a>',
    ),
    "tsvector": ("", "'a':1A,2B 'b''c' '\\\\':3", "'NULL' '$1' ' sp '", "'x':16383"),
    "tsquery": ("'a' & !'b' <2> 'c':*AB", "'\\\\' | ' '' '", "!!'NULL'", "'{}'"),
    "uuid": ("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
    "pg_lsn": ("0/0", "FFFFFFFF/FFFFFFFF", "0/15D4F68"),
    "xid": ("0", "4294967295", "3"),
    "xid8": ("0", "18446744073709551615", "3"),
    "cid": ("0", "4294967295"),
    "oid": ("0", "4294967295"),
    "tid": ("(0,0)", "(4294967295,65535)", "(1,2)"),
    "pg_snapshot": ("10:20:10,14,15", "1:1:"),
    "txid_snapshot": ("10:20:10,14,15", "1:1:"),
    "int2vector": ("", "1 -2 3", "32767"),
    "oidvector": ("", "0 4294967295", "7"),
    "aclitem": ("postgres=arwdDxt/postgres", "=r*/postgres", "postgres=/postgres"),
    "point": ("(0,0)", "(NaN,Infinity)", "(1e308,-0)", "(0.1,5e-324)"),
    "line": ("{1,2,3}", "{-0,1,Infinity}", "{0.1,0.2,NaN}"),
    "lseg": ("[(0,0),(1,1)]", "[(0.1,-Infinity),(NaN,5e-324)]"),
    "box": ("(1,1),(0,0)", "(2,0.5),(0,0)", "(NaN,Infinity),(0.1,0.2)"),
    "path": ("[(0,0),(1,1)]", "((0,0),(1,1))", "[(0.1,NaN)]"),
    "polygon": ("((0,0),(1,1),(1,0))", "((0.1,5e-324))"),
    "circle": ("<(0,0),0>", "<(0.1,-0),NaN>", "<(0,0),Infinity>"),
    "regclass": ("pg_catalog.pg_class", "-", "99999999", 'odd."nam.e ""%"', "odd.cursed"),
    "regtype": ("integer", "-", '"char"', "timestamp with time zone[]", "odd.mood", "99999999"),
    "regproc": ("pg_catalog.now", "-", "99999999"),
    "regprocedure": ("pg_catalog.abs(integer)", "pg_catalog.now()", "-", "odd.even(integer,text[])"),
    "regoper": ("pg_catalog.||/", "0", "99999999"),
    "regoperator": ("+(integer,integer)", "0", "!!(NONE,tsquery)"),
    "regrole": ("postgres", "-", "99999999"),
    "regnamespace": ("pg_catalog", "-", "odd", '"sche.ma ""%"'),
    "regconfig": ("simple", "english", "-"),
    "regdictionary": ("simple", "english_stem", "-"),
    "regcollation": ('"C"', '"POSIX"', "-"),
    "int4range": ("empty", "(,)", "[-2147483648,2147483646)", "(1,5]"),
    "int8range": ("empty", "(,)", "[1,)"),
    "numrange": ("empty", "(,)", "[1.0,1.00]", "(NaN,)", "[-Infinity,Infinity]", "(1.50,2.5]"),
    "tsrange": ("empty", "(,)", "[-infinity,infinity]", '("4713-01-01 00:00:00 BC","294276-12-31 23:59:59.999999"]'),
    "tstzrange": ("empty", "(,)", "[2000-01-01 00:00+00,)"),
    "daterange": ("empty", "(,)", "[2000-01-01,2000-01-02]", "[-infinity,infinity)"),
    "int4multirange": ("{}", "{(,)}", "{[1,2),[5,9]}"),
    "int8multirange": ("{}", "{(,)}", "{[1,2),[5,9]}"),
    "nummultirange": ("{}", "{(,)}", "{[1.0,1.00],(2,NaN)}"),
    "tsmultirange": ("{}", "{(,)}", "{[2000-01-01,2001-01-01),(2002-01-01,)}"),
    "tstzmultirange": ("{}", "{[2000-01-01 00:00+00,2001-01-01 00:00+00)}"),
    "datemultirange": ("{}", "{[2000-01-01,2001-01-01),(2002-01-01,)}"),
}  # fmt: skip
"""By what format_type() calls the type."""

WITHOUT_INPUT = frozenset(
    {
        "gtsvector", "pg_brin_bloom_summary", "pg_brin_minmax_multi_summary", "pg_dependencies", "pg_mcv_list",
        "pg_ndistinct", "pg_node_tree",
    }
)  # fmt: skip
"""Types that a column can have but whose values PostgreSQL reads from no text: a dump has no way with them either."""

WITH_MODIFIERS: dict[str, tuple[str | bytes, ...]] = {
    "numeric(10,2)": ("1", "-99999999.99", "NaN"),
    "numeric(3,5)": ("0.00123",),
    "numeric(2,-3)": ("12345",),
    "character(5)": ("", "a", "  b", "é☃"),
    "character varying(3)": ("", "   ", "abc"),
    "bit(7)": ("0101010",),
    "bit varying(7)": ("", "010"),
    "timestamp(0) without time zone": ("2000-01-01 00:00:01",),
    "timestamp(3) with time zone": ("2000-01-01 00:00:00.123+00",),
    "time(2) without time zone": ("01:02:03.45",),
    "interval year to month": ("13 months",),
    "interval day to second(2)": ("1 day 00:00:01.25",),
    'text COLLATE pg_catalog."POSIX"': ("a", "B", "é"),
}

OWN_TYPES = """
CREATE TYPE odd.mood AS ENUM ('sad', '', 'it''s', ' ', '\\N', 'NULL', '"', 'ünïcode', '{}', 'Sad');
CREATE TYPE odd.inner_pair AS (a int, gone text, b text);
ALTER TYPE odd.inner_pair DROP ATTRIBUTE gone;
CREATE TYPE odd.outer_pair AS (p odd.inner_pair, q odd.inner_pair[], "r ""%" numeric);
CREATE TYPE odd.no_fields AS ();
CREATE DOMAIN odd.positive AS integer CHECK (VALUE > 0);
CREATE DOMAIN odd.small_positive AS odd.positive CHECK (VALUE < 100);
CREATE DOMAIN odd.three AS integer[] CHECK (array_length(VALUE, 1) = 3);
CREATE DOMAIN odd.a_pair AS odd.inner_pair CHECK ((VALUE).a IS DISTINCT FROM 7);
CREATE DOMAIN odd.always AS text NOT NULL;
CREATE TYPE odd.float_range AS RANGE (SUBTYPE = double precision);
CREATE TYPE odd.text_range AS RANGE (SUBTYPE = text, COLLATION = "C");
CREATE TYPE odd.pair_range AS RANGE (SUBTYPE = odd.inner_pair);
CREATE FUNCTION odd.even(integer, text[]) RETURNS boolean LANGUAGE sql AS 'SELECT $1 % 2 = 0';
"""

OWN_VALUES: dict[str, tuple[str | bytes, ...]] = {
    "odd.mood": ("sad", "", "it's", " ", "\\N", "NULL", '"', "ünïcode", "{}", "Sad"),
    "odd.inner_pair": ("(,)", '(1,"")', '(1,"a""b\\\\c")', "(-1,NULL)", '(,"\n\t,()")', "(2,é)", b'(3,"\xff")'),
    "odd.outer_pair": ("(,,)", '("(,)",{},NaN)', '("(1,"""")","{NULL,""(,)"",""(2,\\\\""a,b\\\\"")""}",1.00)'),
    "odd.no_fields": ("()",),
    "odd.positive": ("1", "2147483647"),
    "odd.small_positive": ("1", "99"),
    "odd.three": ("{1,2,3}", "[0:2]={4,5,6}", "{NULL,NULL,NULL}"),
    "odd.a_pair": ("(,)", "(8,x)"),
    "odd.always": ("", "NULL", "\\N"),
    "odd.float_range": ("empty", "(,)", "[-0,NaN]", "[0.1,5e300)"),
    "odd.text_range": ("empty", "(,)", '["",NULL]', '["\\\\N",é)', '["a,b)","a[""c"]'),
    "odd.pair_range": ("empty", "(,)", '["(1,a)","(2,)")'),
    "odd.float_multirange": ("{}", "{[0.1,0.2),[1,NaN]}"),
    "odd.text_multirange": ("{}", '{["",a],["b c","d""e"]}'),
    "information_schema.sql_identifier": ("x", "NULL"),
    "information_schema.cardinal_number": ("0", "7"),
    "information_schema.yes_or_no": ("YES", "NO"),
    "information_schema.character_data": ("", "\\N"),
    "information_schema.time_stamp": ("2000-01-01 00:00:00.12+00",),
}

EXTENSIONS: dict[str, dict[str, tuple[str | bytes, ...]]] = {
    "hstore": {"ext.hstore": ("", "a=>NULL", '"NULL"=>"NULL"', '"\\\\N"=>"", " "=>"=>"', '"a\\"b"=>"\n"', '"é"=>"$1"')},
    "citext": {"ext.citext": ("", "a", "B", "NULL", "\\N", "é")},
    "ltree": {"ext.ltree": ("", "a.b.c"), "ext.lquery": ("*.a{1,2}.!b", "a"), "ext.ltxtquery": ("a & b*@",)},
    "cube": {"ext.cube": ("(1,2),(3,4)", "(0.1)", "(-0,1e-300)")},
    "seg": {"ext.seg": ("1.50", "<1", "1 .. 2.0", "~5")},
    "isn": {"ext.isbn13": ("978-0-393-04002-9",), "ext.ean13": ("0220356483481",), "ext.upc": ("220356483481",)},
    "intarray": {"ext.query_int": ("1&(2|!3)",)},
    "lo": {"ext.lo": ("0", "4294967295")},
}
"""By extension, all created in the schema ext."""

ODD_NAMES: tuple[bytes, ...] = tuple(
    name.encode() if isinstance(name, str) else name
    for name in (
        "select", "table", "user", "UPPER", " lead", "trail ", "sp ace", "d.ot", 'qu"ote', '"', '""', "'", "a'b", "back\\slash",
        "\\", "%", "%s", "100%", "%(x)s", "$1", "$$", ";--", "/*", "{}", "{a,b}", "a,b", ":x", "?", "new\nline", "tab\t", "cr\r",
        "naïve", "☃", "𝄞", "é" * 31 + "x", "n" * 63, "0", "-", "NULL", "\\N", "xmin_", "old", "new", "excluded", "mine", "theirs",
        "hit", "gone", b"\xff\xfe", b"latin\xe4",
    )
)  # fmt: skip
"""For schemas, tables and columns; some are those that pmgsync's own statements use as aliases."""
