"""What a row comes to does not depend on how it came: by the chain, or in a snapshot of it."""

from __future__ import annotations

from typing import Any

import pytest

from pmgsync.core.profile import MergeRule, Policy
from pmgsync.postgres.copy.chain_restore import ChainRestore
from pmgsync.postgres.copy.take import take_chain_snapshot
from tests.harness.apply_pairs import MakePair
from tests.harness.server import INCARNATION, Pair, make_profile, rule

pytestmark = pytest.mark.cluster


def resynchronise(pair: Pair) -> None:
    """Bring what the origin answers for into the target, as a whole."""
    source, target = (pair.server.dsn(name) for name in pair.names)
    who: dict[str, Any] = {"origin": pair.origin, "master": pair.master, "members": pair.members}
    restore = ChainRestore(target, pair.profile, own_cid=99, **who)
    try:
        for piece, attachment in take_chain_snapshot(
            source, pair.profile, own=(pair.origin, INCARNATION), **who
        ):  # fmt: skip
            if piece["kind"] == "result":
                restore.finish(piece)
            else:
                restore.feed(piece, attachment)
        assert not restore.stale
    finally:
        restore.close()


OWNER_TYPES = {"int": "int", "text": "text", "char": "char(4)", "varchar": "varchar(9)", "numeric": "numeric"}
OWNERS = ("1", "2", "3", "4", "12")


@pytest.mark.parametrize("origin", [1, 2])
def test_rows_are_the_owners_whatever_the_type_of_the_column(make_pair: MakePair, origin: int) -> None:
    names = {name: f"o_{name}" for name in OWNER_TYPES}
    profile = make_profile(*(rule(name, Policy.OWNED, owner="cid") for name in names.values()))
    schema = ";".join(
        f"CREATE TABLE {names[name]} (cid {kind}, n int PRIMARY KEY); ALTER TABLE {names[name]} REPLICA IDENTITY FULL"
        for name, kind in OWNER_TYPES.items()
    )
    pair = make_pair(schema, profile, origin=origin)
    expected = [1, 4, 12, None] if origin == 1 else [2]
    for name in names.values():
        values = ", ".join(f"('{owner}', {n})" for n, owner in enumerate((*OWNERS, *OWNERS)))
        pair.run(f"INSERT INTO {name} VALUES {values}, (NULL, 99)")
    for name in ("text", "varchar"):
        pair.run(f"INSERT INTO {names[name]} VALUES ('nobody', 200), ('', 201), ('02', 202), ('2 ', 203), ('1_2', 204)")
    pair.apply()
    live = {name: pair.table(name, on=pair.target) for name in names.values()}
    for name in ("int", "numeric"):
        found = pair.run(f"SELECT DISTINCT cid::int FROM {names[name]} ORDER BY 1", on=pair.target)
        assert [cid for (cid,) in found] == expected
    assert len(live["o_char"]) == len(live["o_int"])
    texts = {"nobody", "", "02", "1_2"} if origin == 1 else {"2 "}
    assert texts <= {str(cid.decode()) for (cid,) in pair.run("SELECT cid FROM o_text WHERE n > 199", on=pair.target)}  # type: ignore[attr-defined]

    # The same rows in a snapshot, over leftovers of the owner's and beside rows that are not its to touch.
    resynchronise(pair)
    assert {name: pair.table(name, on=pair.target) for name in names.values()} == live

    # And taken away again, by one TRUNCATE.
    for name in names.values():
        pair.run(f"INSERT INTO {name} VALUES ('3', 500)", on=pair.target)
    pair.run("TRUNCATE " + ", ".join(names.values()))
    pair.apply()
    assert {name: len(pair.table(name, on=pair.target)) for name in names.values()} == dict.fromkeys(names.values(), 1)


# Column type, its values in an order in which neither their texts nor their values sort.
ADVANCING = {
    "char": ("char(3)", ("Z", "A", "M")),
    "bool": ("boolean", ("t", "f")),
    "inet": ("inet", ("10.0.0.9", "10.0.0.1", "10.0.0.5")),
    "letter": ('"char"', ("Z", "A", "M")),
    "plain": ("text", ("Z", "A", "M")),
    "number": ("numeric", ("2.50", "1.0", "30")),
}


Rows = list[tuple[bytes | None, ...]]


def merged_both_ways(pair: Pair, table: str, mine: list[str], theirs: list[str]) -> tuple[Rows, Rows]:
    """Return a table's rows when `theirs` met `mine` live, and in a snapshot."""
    pair.run(f"INSERT INTO {table} VALUES {', '.join(mine)}", on=pair.target)
    pair.run(f"INSERT INTO {table} VALUES {', '.join(theirs)}")
    pair.apply()
    live = pair.table(table, on=pair.target)
    pair.run(f"TRUNCATE {table}; INSERT INTO {table} VALUES {', '.join(mine)}", on=pair.target)
    resynchronise(pair)
    return live, pair.table(table, on=pair.target)


@pytest.mark.parametrize("keyed", [True, False])
def test_values_advance_the_same_way(make_pair: MakePair, keyed: bool) -> None:
    rules = {name: MergeRule("advance", order=values) for name, (_, values) in ADVANCING.items()}
    profile = make_profile(rule("t", Policy.MERGE, key=("k",), rules=rules, deletes=False))
    columns = ", ".join(f"{name} {kind}" for name, (kind, _) in ADVANCING.items())
    pair = make_pair(f"CREATE TABLE t (k int{' PRIMARY KEY' if keyed else ' NOT NULL'}, {columns})", profile, origin=2)
    mine, theirs, wanted = [], [], []
    for k, (left, right) in enumerate((left, right) for left in range(3) for right in range(3)):
        rows = [
            ", ".join(f"'{values[min(place, len(values) - 1)]}'" for _, values in ADVANCING.values())
            for place in (left, right)
        ]
        mine.append(f"({k}, {rows[0]})")
        theirs.append(f"({k}, {rows[1]})")
        wanted.append(f"({k}, {rows[(left > right and 0) or int(right >= left)]})")
    live, resynchronised = merged_both_ways(pair, "t", mine, theirs)
    assert live == resynchronised
    pair.run(f"CREATE TABLE wanted (LIKE t); INSERT INTO wanted VALUES {', '.join(wanted)}", on=pair.target)
    assert live == pair.table("wanted", on=pair.target)


def second(row: tuple[bytes | None, ...]) -> bytes:
    """Return the text of a row's second column."""
    return (row[0] or b"").split(b",")[1]


@pytest.mark.parametrize("keyed", [True, False])
def test_ties_are_decided_the_same_way(make_pair: MakePair, keyed: bool) -> None:
    """Groups of `latest` whose compared values are equal, with a value that wins the tie and without one."""
    kinds = {"c": ("char(3)", "A"), "b": ("boolean", "f"), "i": ("inet", "10.0.0.1"), "q": ('"char"', "A")}
    rules = {name: MergeRule("latest", by="at", tie=tie) for name, (_, tie) in kinds.items()}
    rules["at"] = MergeRule("latest", by="at")
    profile = make_profile(
        *(
            rule(f"t_{name}", Policy.MERGE, key=("k",), rules={"v": rules[name], "at": rules["at"]}, deletes=False)
            for name in kinds
        ),
        *(
            rule(f"g_{name}", Policy.MERGE, key=("k",), deletes=False, rules={"v": MergeRule("greatest")})
            for name in kinds if name != "b"
        ),
    )  # fmt: skip
    key = "int PRIMARY KEY" if keyed else "int NOT NULL"
    values = {"c": ("'A'", "'Z'"), "b": ("'f'", "'t'"), "i": ("'10.0.0.1'", "'10.0.0.9/8'"), "q": ("'A'", "'Z'")}
    schema = [f"CREATE TABLE t_{name} (k {key}, v {kind}, at int)" for name, (kind, _) in kinds.items()]
    schema += [f"CREATE TABLE g_{name} (k {key}, v {kind})" for name, (kind, _) in kinds.items() if name != "b"]
    pair = make_pair(";".join(schema), profile, origin=2)
    for name, (low, high) in values.items():
        mine = [f"(1, {low}, 5)", f"(2, {high}, 5)", f"(3, {low}, NULL)", "(4, NULL, 5)"]
        theirs = [f"(1, {high}, 5)", f"(2, {low}, 5)", f"(3, {high}, NULL)", f"(4, {low}, 5)"]
        live, resynchronised = merged_both_ways(pair, f"t_{name}", mine, theirs)
        assert live == resynchronised
        assert {second(row) for row in live} == {second(live[3])}, live
        if name != "b":
            live, resynchronised = merged_both_ways(
                pair, f"g_{name}", [f"(1, {low})", f"(2, {high})"], [f"(1, {high})", f"(2, {low})"]
            )
            assert live == resynchronised and len(set(map(second, live))) == 1


def test_rows_whose_key_is_null_are_found(make_pair: MakePair) -> None:
    profile = make_profile(rule("t", Policy.MERGE, key=("a", "b"), rules={"v": MergeRule("greatest")}, deletes=False))
    pair = make_pair("CREATE TABLE t (a int NOT NULL, b text, v int); CREATE INDEX ON t (a, b)", profile, origin=2)
    live, resynchronised = merged_both_ways(
        pair, "t", ["(1, NULL, 5)", "(2, NULL, 1)", "(3, 'x', 1)"], ["(1, NULL, 1)", "(2, NULL, 5)", "(3, 'y', 1)"]
    )
    assert live == resynchronised == [(b"(1,,5)",), (b"(2,,5)",), (b"(3,x,1)",), (b"(3,y,1)",)]
