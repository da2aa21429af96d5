"""Profiles: the shipped ones say what they should, and mistakes in one's own are found and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmgsync.core.profile import OWN_SCHEMA, MergeRule, Policy
from pmgsync.errors import ConfigError
from pmgsync.profile_file import load_profile


def write(directory: Path, text: str) -> str:
    path = directory / "own.toml"
    path.write_text(text)
    return str(path)


def test_the_gateways_profile_follows_its_facts() -> None:
    profile = load_profile("pmg")
    policies = {rule.name: rule.policy.value for rule in profile.tables}
    assert {name for name, policy in policies.items() if policy == "owned"} == {
        "cmailstore", "cstatistic", "creceivers", "localstat"
    }  # fmt: skip
    assert {name for name, policy in policies.items() if policy == "merge"} == {
        "cmsreceivers",
        "cgreylist",
        "userprefs",
    }
    assert {name for name, policy in policies.items() if policy == "local"} == {"clusterinfo", "statinfo"}
    assert len(policies) == 19
    assert all(rule.schema == "public" for rule in profile.tables)

    mails = profile.rule_for("public", "cmailstore")
    assert mails is not None
    assert (mails.owner, mails.local_columns) == ("cid", frozenset({"id"}))
    receivers = profile.rule_for("public", "cmsreceivers")
    assert receivers is not None
    assert receivers.key == ("cmailstore_cid", "cmailstore_rid", "ticketid")
    assert receivers.inserts_by_owner == "cmailstore_cid"
    assert receivers.rules == {
        "status": MergeRule("advance", order=("N", "D")),
        "seen": MergeRule("latest", by="seenmtime", tie="S"),
        "seenmtime": MergeRule("latest", by="seenmtime"),
        "mtime": MergeRule("greatest"),
    }
    assert receivers.columns >= {"ticketid", "seen", "seenmtime", "status", "mtime"}
    assert profile.compares_times
    assert not load_profile("mirror").compares_times
    greylist = profile.rule_for("public", "cgreylist")
    assert greylist is not None
    assert not greylist.deletes
    assert greylist.rules["rctime"].kind == "least"
    assert profile.rule_for("public", "nothing") is None

    assert ("creceivers", "cstatistic_cid") in profile.cid0
    assert len(profile.cid0) == 6
    assert profile.services == ("pmgpolicy", "pmg-smtp-filter")
    assert "pmg-tls.pem" in profile.files[0].exclude
    assert profile.files[2].named_in == (("cmailstore", "file"),)
    assert [tree.tree for tree in profile.files if tree.kind == "spool"] == ["cluster/{cid}"]
    assert {action.role for action in profile.actions} == {"", "node"}


def test_mirror_takes_every_table_but_the_systems_own() -> None:
    profile = load_profile("mirror")
    rule = profile.rule_for("sales", "orders")
    assert rule is not None
    assert rule.policy is Policy.MIRROR
    for schema in ("pg_catalog", "pg_toast", "information_schema", OWN_SCHEMA):
        assert profile.rule_for(schema, "x") is None


def test_the_digest_is_of_what_is_said_and_not_of_how(tmp_path: Path) -> None:
    first = load_profile(write(tmp_path, 'all_tables = true\n[tables.t]\npolicy = "local"\n'))
    same = load_profile(
        write(tmp_path, '# a comment\ndescription = "x"\nall_tables=true\n[tables]\nt = {policy = "local"}\n')
    )
    other = load_profile(write(tmp_path, 'all_tables = true\n[tables.u]\npolicy = "local"\n'))
    assert first.digest == same.digest != other.digest
    assert len(first.digest) == 64


def test_a_table_of_another_schema(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, '[tables."sales.orders"]\npolicy = "mirror"\n'))
    assert profile.rule_for("sales", "orders") is not None
    assert profile.rule_for("public", "orders") is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("tables", "all_tables")),
        ("[tables.t]\n", ("[tables.t] policy", "missing")),
        ('[tables.t]\npolicy = "mirrored"', ("[tables.t] policy", "'mirrored'", "mirror, owned, merge, local")),
        ('[tables.t]\npolicy = "owned"', ("[tables.t] owner", "missing")),
        ('[tables.t]\npolicy = "merge"', ("[tables.t] merge", "missing")),
        ('[tables.t]\npolicy = "mirror"\nowner = "cid"', ("[tables.t] owner", "no meaning")),
        ('[tables.t]\npolicy = "local"\nkey = ["a"]', ("[tables.t] key", "no meaning")),
        ('[tables.t]\npolicy = "owned"\nownr = "cid"', ("ownr", "did you mean 'owner'")),
        ('[tables.t]\npolicy = "mirror"\nkey = ["a", "a"]', ("[tables.t] key", "different")),
        ('[tables.t]\npolicy = "merge"\n[tables.t.merge]\na = "most"', ("merge.a rule", "'most'", "greatest")),
        ('[tables.t]\npolicy = "merge"\n[tables.t.merge]\na = "latest"', ("merge.a by", "missing")),
        ('[tables.t]\npolicy = "merge"\nmerge.a = {rule = "advance", order = ["N"]}', ("order", "at least two")),
        ('[tables.t]\npolicy = "merge"\nmerge.a = {rule = "least", tie = "x"}', ("tie", "no meaning")),
        ('[tables.t]\npolicy = "merge"\nkey = ["a"]\nmerge.a = "least"', ("merge.a", "key")),
        ('[tables.t]\npolicy = "owned"\nowner = "a"\nlocal_columns = ["a"]', ("local_columns", "rely on")),
        ('[tables."pg_catalog.t"]\npolicy = "mirror"', ("pg_catalog", "never synchronised")),
        ('[tables.t]\npolicy = "mirror"\n[tables."public.t"]\npolicy = "local"', ("public.t", "twice")),
        ('cid0 = ["u.cid"]\n[tables.t]\npolicy = "mirror"', ("cid0", "'u'", "not in [tables]")),
        ('cid0 = ["t"]\n[tables.t]\npolicy = "mirror"', ("cid0", "table.column")),
        ('cid0 = ["t.cid"]\n[tables.t]\npolicy = "local"', ("cid0", "local")),
        ("all_tables = 1", ("all_tables", "true or false")),
        ('all_tables = true\n[[files]]\nkind = "config"\nroot = "etc"', ("[[files]] number 1 root", "absolute")),
        ('all_tables = true\n[[files]]\nkind = "config"\nroot = "/e"\ninclude = ["../x"]', ("include", "relative")),
        ('all_tables = true\n[[files]]\nkind = "spool"\nroot = "/e"\ntree = "all"', ("tree", "{cid}")),
        ('all_tables = true\n[[actions]]\nfiles = ["/a"]', ("[[actions]] number 1 run", "missing")),
        ('all_tables = true\n[[actions]]\nrun = ["true"]', ("[[actions]] number 1", "occasion")),
        ("[tables", ("not TOML",)),
    ],
)
def test_errors_name_file_key_and_expectation(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    for part in (path, *parts):
        assert part in str(caught.value)


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mirror'"):
        load_profile("mirrors")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(str(tmp_path / "none.toml"))
