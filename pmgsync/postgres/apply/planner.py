"""The planner: from decoded changes to a plan for this node, by the profile's policies and the local catalog."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core import ceilings as sequences
from pmgsync.core import ddl
from pmgsync.core.changes import Change, Inserted, Truncated, Unread, transactions
from pmgsync.core.named_files import NamedFile, named_in, naming_of
from pmgsync.core.owners import Writers
from pmgsync.core.pgoutput import Emitted, Relation
from pmgsync.core.policies import counts_wholly, owner_index, select, select_unread
from pmgsync.core.positions import format_lsn
from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.errors import ApplyError
from pmgsync.postgres.apply.plan import (
    ApplyStats,
    Item,
    NoteItem,
    OfTable,
    PlanItem,
    PlannedTransaction,
    SchemaItem,
    SequenceItem,
    TruncateItem,
    count_of,
    one_by_one,
    plan_wholly,
)
from pmgsync.postgres.apply.schema import missing
from pmgsync.postgres.apply.stale import Kind, StaleTable, StaleTables
from pmgsync.postgres.apply.target import Target, load_target
from pmgsync.postgres.session import quote_ident

_Route = tuple[TableRule | None, bool | None, int | None]
_UNKNOWN: tuple[None, bool] = (None, False)


# Over 250 lines: every kind of change shares the route of its table and what makes the table stale.
class Planner:
    """Keeps what it has learned of tables until it is told to forget."""

    def __init__(self, profile: Profile, stats: ApplyStats, stale: StaleTables) -> None:
        self._writers = Writers.at(0, 0, ())
        self._profile = profile
        self._stats = stats
        self._stale = stale
        self._rules: dict[tuple[bytes, bytes], TableRule | None] = {}
        self._routes: dict[bytes, _Route] = {}
        self._targets: dict[bytes, Target] = {}
        # Tables of which nothing is left out: their target, and whether all changes count. They are looked at again
        # when any table becomes stale or is described anew.
        self._ready: dict[bytes, tuple[Target | None, bool]] = {}
        self._lacking: list[bytes] = []
        self._number = 0
        self._naming = naming_of(profile)
        self._named: list[NamedFile] = []

    @property
    def writers(self) -> Writers:
        """Who may write what in what is planned next."""
        return self._writers

    def set_writers(self, writers: Writers) -> None:
        """Say who may write what, from the next plan on."""
        if writers is not self._writers and writers != self._writers:
            self._writers = writers
            self._routes.clear()
            self._ready.clear()

    def take_named(self) -> list[NamedFile]:
        """Return the files that new rows name which were planned since this was last asked."""
        named, self._named = self._named, []
        return named

    def look_again(self) -> None:
        """Say that what is known of stale tables may have changed since the last plan."""
        self._ready.clear()

    def forget(self) -> None:
        """Look every table up again at its next use."""
        self._targets.clear()
        self._routes.clear()
        self._ready.clear()
        self._named.clear()

    def renew(self, cursor: Cursor, items: list[PlanItem], lsn: int) -> None:
        """Put what the catalog says now into a plan that was made earlier, and leave out what became stale since.

        Afterwards it has an item for each row.

        Raises:
            ApplyError: when a table is not there any more.
            ProtocolError: when a row is malformed.
        """

        def kept(target: Target) -> bool:
            return not self._stale.skips((target.relation.namespace, target.relation.name), lsn)

        renewed: list[PlanItem] = []
        for item in one_by_one(items):
            if isinstance(item, Item):
                if kept(item.target):
                    target = self._target(cursor, item.target.relation, item.target.rule, lsn)
                    renewed.append(item._replace(target=target))
                else:
                    self._stats.stale += 1
            elif isinstance(item, TruncateItem):
                renewed.append(
                    item._replace(
                        targets=tuple(self._target(cursor, t.relation, t.rule) for t in item.targets if kept(t)),
                        parts=tuple((self._target(cursor, t.relation, t.rule), w) for t, w in item.parts if kept(t)),
                    )
                )
            else:
                renewed.append(item)
        items[:] = renewed

    def plan(
        self, cursor: Cursor, changes: Sequence[Change | Unread], lsn: int
    ) -> tuple[list[PlanItem], Sequence[Change | Unread]]:
        """Return what a transaction's changes come to here, and those that follow a change of the schema: they can be
        planned when that is done.

        Raises:
            ApplyError: when the owner of a row cannot be told.
            ProtocolError: when a row is malformed.
            psycopg2.Error: when the catalog cannot be read.
        """
        items: list[PlanItem] = []
        for at, change in enumerate(changes):
            if isinstance(change, Truncated):
                self._truncate(cursor, change, items, lsn)
            elif isinstance(change, Emitted):
                self._emitted(change, items, lsn)
                if items and type(items[-1]) is SchemaItem:
                    return items, changes[at + 1 :]
            else:
                target, wholly = self._ready.get(change[0].raw, _UNKNOWN)
                if wholly:
                    plan_wholly(target, change, items)  # type: ignore[arg-type]
                else:
                    self._of_table(cursor, change, items, lsn)
        for raw in self._lacking:
            # The column may be added here any time, and then its values count.
            self._targets.pop(raw, None)
        self._lacking.clear()
        return items, ()

    def plan_together(self, changes: Sequence[Change | Unread]) -> list[PlanItem] | None:
        """Return what changes of many transactions come to here, given by table; None when that depends on each
        transaction, or is not known yet.

        Raises:
            ProtocolError: when a row is malformed.
        """
        items: list[PlanItem] = []
        named: list[NamedFile] = []
        skipped = 0
        for change in changes:
            assert not isinstance(change, Truncated | Emitted)
            relation, counts = change[0], change
            rule, wholly, owner = self._routes.get(relation.raw, (None, None, None))
            if wholly is False:
                skipped += count_of(change)
                continue
            target = self._settled(relation)
            if rule is None or target is None or target.fires:
                return None
            if wholly is None:
                try:
                    counts = self._that_count(rule, relation, change, owner)
                except ApplyError:
                    return None
                skipped += count_of(change) - count_of(counts)
            named += named_in(self._naming, counts)
            plan_wholly(target, counts, items)
        self._named += named
        self._stats.skipped += skipped
        return items

    def plan_apart(
        self, messages: Sequence[bytes], after: int, writers: Writers, cursor: Cursor
    ) -> list[PlannedTransaction]:
        """Return the plans of the transactions of a frame that were planned together, later than an LSN.

        Raises: as `plan`.
        """
        before, skipped, planned = self._writers, self._stats.skipped, []
        self.set_writers(writers)
        for piece in transactions(messages):
            assert piece.commit is not None
            if piece.commit.commit_lsn > after:
                items, _ = self.plan(cursor, piece.changes, piece.commit.commit_lsn)
                planned.append(PlannedTransaction(piece.commit.commit_lsn, piece.commit.commit_time_us, items))
        self.set_writers(before)
        # Both were noted when they were planned together.
        self._stats.skipped = skipped
        self.take_named()
        return planned

    def _settled(self, relation: Relation) -> Target | None:
        """Return the target of a table when it is known, nothing is new about it, and nothing of it left out."""
        target, _ = self._ready.get(relation.raw, _UNKNOWN)
        if target is not None:
            return target
        key, stale = (relation.namespace, relation.name), self._stale
        target, route = self._targets.get(relation.raw), self._routes.get(relation.raw)
        if (
            target is None or target.lacking or key in stale.tables or route is None
            or stale.newest.get(key) is not relation or stale.relations.get(key) != relation.id
        ):  # fmt: skip
            return None
        self._ready[relation.raw] = (target, route[1] is True and key not in self._naming)
        return target

    def _of_table(self, cursor: Cursor, change: OfTable, items: list[PlanItem], lsn: int) -> None:
        """Plan changes of a table."""
        relation = change[0]
        known, _ = self._ready.get(relation.raw, _UNKNOWN)
        rule, wholly, owner = self._routes.get(relation.raw) or self._route(relation, items, lsn)
        if rule is None or wholly is False:
            self._stats.skipped += count_of(change)
            return
        if known is None and self._leaves_out(relation, items, lsn):
            self._stats.stale += count_of(change)
            return
        if wholly is None:
            try:
                counts = self._that_count(rule, relation, change, owner)
            except ApplyError as error:
                error.lsn = format_lsn(lsn)
                raise
            self._stats.skipped += count_of(change) - count_of(counts)
            if not count_of(counts):
                return
            change = counts
        target = known or self._usable(cursor, relation, rule, items, lsn)
        if target is None:
            self._stats.stale += count_of(change)
            return
        key = (relation.namespace, relation.name)
        if known is None and not target.lacking and key not in self._stale.tables:
            self._ready[relation.raw] = (target, bool(wholly) and key not in self._naming)
        self._named += named_in(self._naming, change)
        plan_wholly(target, change, items)

    def _that_count(self, rule: TableRule, relation: Relation, change: OfTable, owner: int | None) -> OfTable:
        """Return what counts of changes to a table of which not all do."""
        if isinstance(change, Unread):
            return select_unread(rule, relation, change, self._writers, owner)
        row = select(rule, relation, change[1], self._writers, owner)
        return Inserted(relation, []) if row is None else (relation, row)

    def _emitted(self, change: Emitted, items: list[PlanItem], lsn: int) -> None:
        """Do nothing: a message of a later version is left out."""
        from_master = self._writers.leads
        if change.prefix == ddl.FETCH_PREFIX:
            tables = [table for table in ddl.unpack_missing(change.content) if self._fetches(table, lsn)]
            items += missing(tables, self._stale, lsn)
        elif change.prefix == sequences.PREFIX.encode() and from_master:
            items.append(SequenceItem(tuple(sequences.unpack_values(change.content))))
        elif change.prefix == ddl.PREFIX and from_master and self._profile.ddl:
            items.append(SchemaItem(ddl.unpack_change(change.content), lsn))
        else:
            self._stats.skipped += 1

    def _fetches(self, table: ddl.MissingContent, lsn: int) -> bool:
        """Return True when a table's content is to be fetched from this origin."""
        schema, name = (part.decode(errors="surrogateescape") for part in (table.schema, table.name))
        rule = self._profile.rule_for(schema, name)
        if rule is None or counts_wholly(rule, self._writers) is False:
            return False
        return not self._stale.skips((table.schema, table.name), lsn)

    def _route(self, relation: Relation, items: list[PlanItem], lsn: int) -> _Route:
        """Return a table's rule, whether all or none of its changes count, and the place of the owner otherwise."""
        rule = self.rule(relation)
        wholly = False if rule is None else counts_wholly(rule, self._writers)
        owner: int | None = None
        if rule is not None and wholly is None:
            try:
                owner = owner_index(rule, relation)
            except ApplyError as error:
                if not self._stale.skips((relation.namespace, relation.name), lsn):
                    self._note(relation, error.message, items, lsn)
        self._routes[relation.raw] = route = (rule, wholly, owner)
        return route

    # -- stale tables

    def _leaves_out(self, relation: Relation, items: list[PlanItem], lsn: int) -> bool:
        """Return True when changes of a table that would count are left out; notes what is new about the table."""
        stale, key = self._stale, (relation.namespace, relation.name)
        if stale.skips(key, lsn):
            stale.newest[key] = relation
            self._ready.clear()
            return True
        if stale.newest.get(key) is relation and stale.relations.get(key) == relation.id:
            return False
        stale.newest[key] = relation
        self._ready.clear()
        known = stale.relations.get(key)
        if known != relation.id:
            stale.relations[key] = relation.id
            items.append(NoteItem(relation=(*key, relation.id)))
            if known is not None:
                # The stream does not have what that table held when it got the name.
                self._note(relation, "another table has its name there since", items, lsn)
        return stale.skips(key, lsn)

    def _usable(
        self, cursor: Cursor, relation: Relation, rule: TableRule, items: list[PlanItem], lsn: int
    ) -> Target | None:
        """Return the target of a table, None when there is none that could take its rows: it is stale then."""
        try:
            target = self._target(cursor, relation, rule, lsn)
        except ApplyError as error:
            self._note(relation, error.message, items, lsn)
            return None
        if target.lacking:
            known = self._stale.tables.get((relation.namespace, relation.name))
            if known is None or known.kind == "none" or not set(target.lacking) <= set(known.columns):
                names = ", ".join(name.decode(errors="backslashreplace") for name in target.lacking)
                self._note(relation, f"it lacks columns here: {names}", items, lsn, target.lacking)
        return target

    def _note(
        self, relation: Relation, reason: str, items: list[PlanItem], lsn: int, columns: tuple[bytes, ...] = ()
    ) -> None:
        self._ready.clear()
        kind: Kind = "columns" if columns else "table"
        table = StaleTable(relation.namespace, relation.name, kind, reason, columns, lsn)
        items.append(NoteItem(stale=self._stale.note(table)))

    def rule(self, relation: Relation) -> TableRule | None:
        """Return what the profile says of a table."""
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
            if target.lacking:
                self._lacking.append(relation.raw)
        return target

    def _truncate(self, cursor: Cursor, change: Truncated, items: list[PlanItem], lsn: int) -> None:
        whole: list[Target] = []
        parts: list[tuple[Target, bytes]] = []
        for relation in change.relations:
            rule = self.rule(relation)
            if rule is None or rule.policy is Policy.LOCAL or counts_wholly(rule, self._writers) is False:
                self._stats.skipped += 1
                continue
            if rule.policy is Policy.MERGE and not rule.deletes:
                self._stats.skipped += 1
                continue
            left_out = self._leaves_out(relation, items, lsn)
            target = None if left_out else self._usable(cursor, relation, rule, items, lsn)
            if target is None:
                self._stats.stale += 1
            elif rule.policy is not Policy.OWNED:
                if rule.policy is Policy.MERGE and rule.inserts_by_owner:
                    parts.append((target, self._owned(rule, relation)))
                elif rule.policy is Policy.MERGE:
                    parts.append((target, b"true"))
                else:
                    whole.append(target)
            else:
                parts.append((target, self._owned(rule, relation)))
        if whole or parts:
            items.append(TruncateItem(tuple(whole), tuple(parts), change.restart_identity))

    def _owned(self, rule: TableRule, relation: Relation) -> bytes:
        """Return the condition that a row is the origin's to write."""
        owner = owner_index(rule, relation)
        assert owner is not None
        return self._writers.condition(quote_ident(relation.columns[owner].name))
