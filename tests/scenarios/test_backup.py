"""`pmgcm backup` and `restore` on a real server: what comes back is what there was, or nothing is touched."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.demo.embedded import EmbeddedPostgres
from tests.harness.command_line import Node, refused
from tests.harness.database import GATEWAY, Database

SEED = b"""
INSERT INTO rule (name, priority) VALUES ('virus', 1), ('spam', 2), (E'bytes \\\\ and\ttabs\nlines', 3);
INSERT INTO rule (name, priority) VALUES ('\xff\xfe\x80 no text', 4), ('', 5), (NULL, 6);
DELETE FROM rule WHERE priority = 2;
INSERT INTO rule_attributes SELECT id, 'colour', '\\x00ff0a5c' FROM rule;
INSERT INTO userprefs (pmail, name, data, mtime) VALUES ('a@example', 'WL', 'x', 1);
INSERT INTO cstatistic (cid, rid, time, bytes, direction, spamlevel, ptime, sender)
SELECT 7, g, g, 1, true, 0, 1, 's' FROM generate_series(1, 300) AS g;
INSERT INTO creceivers VALUES (7, 1, 'r', false), (7, 1, 'r', false);
INSERT INTO cmailstore (cid, rid, time, qtype, bytes, spamlevel, sender, header, file)
VALUES (0, 1, 1, 'S', 1, 1, 's', 'h', 'f');
"""
DAMAGE = """
UPDATE rule SET name = 'changed since'; DELETE FROM userprefs; INSERT INTO rule (name, priority) VALUES ('new', 9);
SELECT setval('rule_id_seq', 900); DELETE FROM rule_attributes; DELETE FROM cstatistic WHERE rid > 100;
INSERT INTO attribut VALUES (1, 'n', 'v')
"""
TABLES = ("rule", "rulegroup", "objectgroup", "object", "attribut", "rule_attributes", "userprefs", "cgreylist")
STATISTICS = ("cstatistic", "creceivers", "localstat", "dailystat")


@dataclass
class Gateway:
    """A node with the gateway's database and configuration, and no services."""

    node: Node
    database: Database
    etc: Path

    def content(self, *tables: str) -> dict[str, list[tuple[object, ...]]]:
        found = {
            table: sorted(self.database.sql(f"SELECT t::text::bytea::text FROM public.{table} AS t"))
            for table in tables
        }
        return found | {"sequence": self.database.sql("SELECT last_value, is_called FROM public.rule_id_seq")}

    def files(self) -> dict[str, tuple[int, bytes]]:
        return {
            str(path.relative_to(self.etc)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
            for path in self.etc.rglob("*")
            if path.is_file() and ".pmgsync" not in path.parts
        }

    def pmgcm(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.node.pmgcm(*map(str, arguments))
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture
def gateway(node: Node, server: EmbeddedPostgres, tmp_path: Path) -> Gateway:
    return make(node, server, "rules", tmp_path / "etc")


def make(node: Node, server: EmbeddedPostgres, name: str, etc: Path, *, encoding: str = "SQL_ASCII") -> Gateway:
    database = Database(server, name, encoding)
    database.sql("SET search_path = public;" + GATEWAY.read_text())
    (etc / "templates").mkdir(parents=True)
    (etc / "pmg.conf").write_text("secret\n")
    (etc / "pmg.conf").chmod(0o600)
    (etc / "templates/main.cf.in").write_bytes(os.urandom(700_000))
    (etc / "domains").write_text("")
    (etc / "ldap.conf").write_text("ldap")
    (etc / "own.conf").write_text("not in the profile")
    lines = node.config.read_text().splitlines()
    dsn = f"dsn = {json.dumps(database.dsn)}"
    node.config.write_text("\n".join([*lines[:-1], dsn, "[files]", f'config_root = "{etc}"', ""]))
    return Gateway(node, database, etc)


@contextlib.contextmanager
def unchanged(gateway: Gateway) -> Iterator[None]:
    before = gateway.content(*TABLES, *STATISTICS), gateway.files()
    yield
    assert (gateway.content(*TABLES, *STATISTICS), gateway.files()) == before


@pytest.mark.cluster
def test_what_was_there_comes_back_and_nothing_else_is_touched(gateway: Gateway, tmp_path: Path) -> None:
    gateway.database.sql(b"SET search_path = public;" + SEED)
    before, files = gateway.content(*TABLES), gateway.files()
    made = gateway.pmgcm("backup", tmp_path / "all.backup")
    assert "never in a backup: public.cmailstore, public.cmsreceivers" in made.stderr
    assert stat.S_IMODE((tmp_path / "all.backup").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []
    shown = json.loads(gateway.pmgcm("backup", "--show", tmp_path / "all.backup", "--json").stdout)
    assert (shown["node"], shown["encoding"], shown["statistics"], shown["encrypted"]) == (
        "pmg1",
        "SQL_ASCII",
        False,
        False,
    )
    assert {each["table"]: each["rows"] for each in shown["tables"]}["public.rule"] == 5
    assert shown["trees"][0] == {"root": "/etc/pmg", "present": True, "files": 4, "directories": 1, "bytes": 700_011}

    gateway.database.sql("SET search_path = public;" + DAMAGE)
    (gateway.etc / "pmg.conf").write_text("edited")
    (gateway.etc / "templates/new.in").write_text("made since")
    (gateway.etc / "templates/main.cf.in").unlink()
    statistics = gateway.content(*STATISTICS)
    refused(gateway.pmgcm("restore", tmp_path / "all.backup", code=1), "Type yes", "--yes")
    assert gateway.content("attribut")["attribut"]
    done = gateway.pmgcm("restore", tmp_path / "all.backup", "--yes")
    assert "public.rule: 6 rows are replaced by 5" in done.stderr
    assert gateway.content(*TABLES) == before
    assert gateway.files() == files
    # What the backup does not have is as it was: statistics, the quarantine, the sequences of both.
    statistics["sequence"] = before["sequence"]
    assert gateway.content(*STATISTICS) == statistics
    assert gateway.database.sql("SELECT count(*) FROM public.cmailstore") == [(1,)]
    # What was replaced is kept, for this user only.
    kept = next((gateway.node.state / "replaced").rglob("pmg.conf"))
    assert kept.read_text() == "edited"
    # The next row gets the number that it would have got.
    assert gateway.database.sql("INSERT INTO public.rule (name, priority) VALUES ('next', 1) RETURNING id") == [(7,)]


@pytest.mark.cluster
def test_statistics_travel_when_they_are_asked_for(gateway: Gateway, tmp_path: Path) -> None:
    gateway.database.sql(b"SET search_path = public;" + SEED)
    before = gateway.content(*TABLES, *STATISTICS)
    gateway.pmgcm("backup", tmp_path / "x", "--statistics")
    gateway.database.sql(
        "SET search_path = public; DELETE FROM cstatistic; DELETE FROM creceivers;SELECT setval('cstatistic_id_seq', 1)"
    )
    gateway.pmgcm("restore", tmp_path / "x", "--yes")
    # Also the numbers that each node gives for itself.
    assert gateway.content(*TABLES, *STATISTICS) == before
    assert gateway.database.sql("SELECT last_value FROM public.cstatistic_id_seq") == [(300,)]


@pytest.mark.cluster
def test_an_encrypted_backup_asks_for_its_passphrase(gateway: Gateway, tmp_path: Path) -> None:
    gateway.database.sql(b"SET search_path = public;" + SEED)
    word, other, file = tmp_path / "word", tmp_path / "other", tmp_path / "x"
    word.write_text("correct horse\n")
    word.chmod(0o600)
    other.write_text("battery staple")
    (tmp_path / "empty").write_text("\n")
    refused(gateway.pmgcm("backup", file, "--encrypt", code=1), "nobody can be asked", "--passphrase-file")
    refused(gateway.pmgcm("backup", file, "--passphrase-file", tmp_path / "empty", code=1), "no passphrase")
    assert not file.exists()
    made = gateway.pmgcm("backup", file, "--passphrase-file", word)
    assert "encrypted" in made.stdout
    data = file.read_bytes()
    assert b"virus" not in data
    assert b"secret" not in data
    before = gateway.content(*TABLES)
    with unchanged(gateway):
        refused(gateway.pmgcm("restore", file, "--yes", code=1), "nobody can be asked", "--passphrase-file")
        refused(gateway.pmgcm("restore", file, "--yes", "--passphrase-file", other, code=1), "not the passphrase")
    gateway.database.sql("SET search_path = public;" + DAMAGE)
    gateway.pmgcm("restore", file, "--yes", "--passphrase-file", word)
    assert gateway.content(*TABLES) == before


@pytest.mark.cluster
def test_a_damaged_backup_touches_nothing(gateway: Gateway, tmp_path: Path) -> None:
    gateway.database.sql(b"SET search_path = public;" + SEED)
    file = tmp_path / "x"
    gateway.pmgcm("backup", file)
    refused(gateway.pmgcm("backup", file, code=1), "is there already", "--overwrite")
    gateway.pmgcm("backup", file, "--overwrite")
    whole = file.read_bytes()
    gateway.database.sql("SET search_path = public;" + DAMAGE)
    with unchanged(gateway):
        # The last byte of all: everything before it is right.
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(gateway.pmgcm("restore", file, "--yes", code=1), "is damaged in chunk")
        file.write_bytes(whole[: len(whole) // 2])
        refused(gateway.pmgcm("restore", file, "--yes", code=1), "ends in the middle")
        file.write_text("something else")
        refused(gateway.pmgcm("restore", file, "--yes", code=1), "not a backup of pmgcm")
        refused(gateway.pmgcm("restore", tmp_path / "none", "--yes", code=1), "cannot be read (No such file")


@pytest.mark.campaign
@pytest.mark.cluster
def test_a_backup_that_does_not_fit_touches_nothing(gateway: Gateway, tmp_path: Path) -> None:
    gateway.database.sql(b"SET search_path = public;" + SEED)
    file = tmp_path / "x"
    gateway.pmgcm("backup", file)
    with unchanged(gateway):
        # A row that the server does not take, in the middle: what was replaced before it comes back.
        gateway.database.sql("ALTER TABLE public.userprefs ADD CONSTRAINT none CHECK (name <> 'WL') NOT VALID")
        refused(
            gateway.pmgcm("restore", file, "--yes", code=1), "does not take the backup at the table public.userprefs"
        )
        gateway.database.sql("ALTER TABLE public.userprefs DROP CONSTRAINT none")
        # A table that no backup has refers to a row that would go.
        gateway.database.sql(
            "CREATE TABLE public.mine (rule int REFERENCES public.rule); INSERT INTO public.rule VALUES (99, 'x', 1);"
            "INSERT INTO public.mine VALUES (99)"
        )
        refused(
            gateway.pmgcm("restore", file, "--yes", code=1), "1 rows of public.mine would refer to rows of public.rule"
        )
        gateway.database.sql("DROP TABLE public.mine; DELETE FROM public.rule WHERE id = 99")
    # Columns: what is missing here is refused, what is new here gets its default.
    gateway.database.sql("ALTER TABLE public.userprefs ADD COLUMN since int NOT NULL DEFAULT 3")
    done = gateway.pmgcm("restore", file, "--yes")
    assert "columns of public.userprefs that the backup does not have get their defaults: since" in done.stderr
    gateway.database.sql("ALTER TABLE public.userprefs DROP COLUMN data; DROP TABLE public.cgreylist")
    refused(
        gateway.pmgcm("restore", file, "--yes", code=1),
        "2 things must be put right",
        "public.userprefs lacks columns here: data",
        "there is no table public.cgreylist",
    )


@pytest.mark.cluster
def test_encodings_are_named(gateway: Gateway, server: EmbeddedPostgres, tmp_path: Path) -> None:
    gateway.database.sql(b"SET search_path = public;" + SEED)
    file = tmp_path / "x"
    gateway.pmgcm("backup", file)
    target = tmp_path / "target"
    target.mkdir()
    text = gateway.node.config.read_text()
    other = Node(target, target / "node.toml", gateway.node.ports)
    other.config.write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith(("[files]", "config_root")))
    )
    there = make(other, server, "wide", target / "etc", encoding="UTF8")
    with unchanged(there):
        done = there.pmgcm("restore", file, "--yes", code=1)
        refused(done, "in SQL_ASCII, this one is in UTF8", "does not take the backup at the table public.rule")


@pytest.mark.cluster
def test_a_node_in_a_cluster_is_not_restored_but_is_backed_up(gateway: Gateway, tmp_path: Path) -> None:
    gateway.database.sql(b"SET search_path = public;" + SEED)
    gateway.pmgcm("create")
    try:
        file = tmp_path / "x"
        gateway.pmgcm("backup", file)
        shown = json.loads(gateway.pmgcm("backup", "--show", file, "--json").stdout)
        assert all(each["table"].startswith("public.") for each in shown["tables"])
        before = gateway.content(*TABLES)
        with unchanged(gateway):
            refused(gateway.pmgcm("restore", file, "--yes", code=1), "this node is in a cluster")
            # The state directory was lost: the database knows.
            (gateway.node.state / "cluster.document").rename(tmp_path / "document")
            refused(gateway.pmgcm("restore", file, "--yes", code=1), "database belongs to a cluster", "pmgcm leave")
            (tmp_path / "document").rename(gateway.node.state / "cluster.document")
    finally:
        gateway.pmgcm("leave", "--yes")
    gateway.database.sql("SET search_path = public;" + DAMAGE)
    gateway.pmgcm("restore", file, "--yes")
    assert gateway.content(*TABLES) == before
