"""The planner: from decoded changes to what is to be done here, by the profile's policies and the local catalog."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.errors import ApplyError
from pmgsync.pgoutput import Change, Delete, Insert, Relation, Row, RowChange, Truncated, Update
from pmgsync.policies import Writers, counts_wholly, filled, owner_index, select
from pmgsync.positions import format_lsn
from pmgsync.postgres.apply.plan import ApplyStats, Item, PlanItem, TruncateItem
from pmgsync.postgres.apply.target import Target, load_target
from pmgsync.postgres.session import quote_ident, quote_literal
from pmgsync.profile import Policy, Profile, TableRule


class Planner:
    """Keeps what it has learned of tables until it is told to forget."""

    def __init__(self, profile: Profile, stats: ApplyStats) -> None:
        self._writers = Writers(0, 0, frozenset())
        self._profile = profile
        self._stats = stats
        self._rules: dict[tuple[bytes, bytes], TableRule | None] = {}
        self._routes: dict[bytes, tuple[TableRule | None, bool | None, int | None]] = {}
        self._targets: dict[bytes, Target] = {}
        self._number = 0

    def set_writers(self, writers: Writers) -> None:
        """Say who may write what, from the next plan on."""
        if writers != self._writers:
            self._writers = writers
            self._routes.clear()

    def forget(self) -> None:
        """Look every table up again at its next use."""
        self._targets.clear()
        self._routes.clear()

    def renew(self, cursor: Cursor, items: list[PlanItem]) -> None:
        """Put what the catalog says now into a plan that was made earlier.

        Raises:
            ApplyError: when a table is not there any more.
        """
        for at, item in enumerate(items):
            if isinstance(item, Item):
                items[at] = item._replace(target=self._target(cursor, item.target.relation, item.target.rule))
            else:
                items[at] = item._replace(
                    targets=tuple(self._target(cursor, t.relation, t.rule) for t in item.targets),
                    parts=tuple((self._target(cursor, t.relation, t.rule), where) for t, where in item.parts),
                )

    def plan(self, cursor: Cursor, changes: Sequence[Change], lsn: int) -> list[PlanItem]:
        """Return what a transaction's changes come to here.

        Raises:
            ApplyError: when a table that counts is not here, or the owner of a row cannot be told.
            psycopg2.Error: when the catalog cannot be read.
        """
        items: list[PlanItem] = []
        append = items.append
        raw: bytes | None = None
        rule: TableRule | None = None
        target: Target | None = None
        owner: int | None = None
        wholly: bool | None = False
        for change in changes:
            if isinstance(change, Truncated):
                self._truncate(cursor, change, items, lsn)
                continue
            relation, row = change
            if relation.raw is not raw:
                raw, target = relation.raw, None
                route = self._routes.get(raw)
                if route is None:
                    route = self._routes[raw] = self._route(relation)
                rule, wholly, owner = route
            if wholly is False:
                self._stats.skipped += 1
                continue
            assert rule is not None and isinstance(row, Insert | Update | Delete)
            if wholly is None:
                try:
                    kept = select(rule, relation, row, self._writers, owner)
                except ApplyError as error:
                    error.lsn = format_lsn(lsn)
                    raise
                if kept is None:
                    self._stats.skipped += 1
                    continue
                row = kept
            if target is None:
                target = self._target(cursor, relation, rule, lsn)
            kind = type(row)
            if kind is Insert:
                append(Item(target, "I", None, row[1]))
            elif rule.policy is Policy.MERGE:
                self._merge(target, row, items)
            elif kind is Update:
                append(Item(target, "U", row[1], row[3]))  # type: ignore[misc]
            else:
                append(Item(target, "D", row[1], None))
        for raw in [raw for raw, target in self._targets.items() if target.narrow]:
            # The column may be added here any time, and then its values count.
            del self._targets[raw]
        return items

    def _merge(self, target: Target, change: RowChange, items: list[PlanItem]) -> None:
        """A merge is a function of the local row and the new one: what was there before on the origin only tells
        another key, and the values that were not sent."""
        if isinstance(change, Delete):
            items.append(Item(target, "D", change.old, None))
            return
        assert isinstance(change, Update)
        whole = None if change.old_is_key else change.old
        new: Row = filled(change.new, whole)
        old = change.old
        if old is not None and any(old[place] != new[place] for place in target.key) and target.rule.deletes:
            items.append(Item(target, "D", old, None))
        items.append(Item(target, "U", None, new))

    def _route(self, relation: Relation) -> tuple[TableRule | None, bool | None, int | None]:
        """Return a table's rule, whether all or none of its changes count, and the place of the owner otherwise."""
        rule = self._rule(relation)
        if rule is None:
            return None, False, None
        wholly = counts_wholly(rule, self._writers)
        return rule, wholly, owner_index(rule, relation) if wholly is None else None

    def _rule(self, relation: Relation) -> TableRule | None:
        key = (relation.namespace, relation.name)
        if key not in self._rules:
            schema, name = (part.decode(errors="surrogateescape") for part in key)
            self._rules[key] = self._profile.rule_for(schema, name)
        return self._rules[key]

    def _target(self, cursor: Cursor, relation: Relation, rule: TableRule, lsn: int = 0) -> Target:
        target = self._targets.get(relation.raw)
        if target is None:
            self._number += 1
            try:
                target = load_target(cursor, relation, rule, self._number)
            except ApplyError as error:
                error.lsn = format_lsn(lsn) if lsn else ""
                raise
            for warning in target.warnings:
                self._stats.warn(warning)
            self._targets[relation.raw] = target
        return target

    def _truncate(self, cursor: Cursor, change: Truncated, items: list[PlanItem], lsn: int) -> None:
        whole: list[Target] = []
        parts: list[tuple[Target, bytes]] = []
        for relation in change.relations:
            rule = self._rule(relation)
            if rule is None or rule.policy is Policy.LOCAL or counts_wholly(rule, self._writers) is False:
                self._stats.skipped += 1
            elif rule.policy is Policy.MIRROR or (rule.policy is Policy.MERGE and rule.deletes):
                target = self._target(cursor, relation, rule, lsn)
                if rule.policy is Policy.MERGE and rule.inserts_by_owner:
                    parts.append((target, self._owned(rule, relation)))
                elif rule.policy is Policy.MERGE:
                    parts.append((target, b"true"))
                else:
                    whole.append(target)
            elif rule.policy is Policy.OWNED:
                parts.append((self._target(cursor, relation, rule, lsn), self._owned(rule, relation)))
            else:
                self._stats.skipped += 1
        if whole or parts:
            items.append(TruncateItem(tuple(whole), tuple(parts), change.restart_identity))

    def _owned(self, rule: TableRule, relation: Relation) -> bytes:
        """Return the condition that a row is the origin's to write."""
        writers = self._writers
        owner = owner_index(rule, relation)
        assert owner is not None
        column = quote_ident(relation.columns[owner].name)
        condition = b"%s = %s" % (column, quote_literal(b"%d" % writers.origin))
        if writers.origin == writers.master:
            members = b", ".join(quote_literal(b"%d" % member) for member in sorted(writers.members)) or b"NULL"
            condition += b" OR %s IS NULL OR %s NOT IN (%s)" % (column, column, members)
        return condition
