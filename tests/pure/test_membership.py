"""The cluster document: what replaces the one held is newer, signed by its epoch's master, and forgets nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.key_change import KeyChange
from pmgsync.core.membership import (
    ClusterDocument,
    Epoch,
    Fork,
    Member,
    SignedDocument,
    accept_document,
    cuts_off,
    first_document,
    format_fingerprint,
    new_epoch,
    parse_fingerprint,
    require_master,
    sign,
    with_confirmed,
    with_fence,
    with_host,
    with_keys,
    with_member,
    without_member,
)
from pmgsync.core.votes import digest
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError, SplitBrainError

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 9)]


def member(number: int) -> Member:
    public = KEYS[number - 1].public_key().public_bytes_raw()
    return Member(number, f"node{number}", f"192.0.2.{number}", 7670, 7671, 7672, bytes([number]) * 32, public)


def founded() -> ClusterDocument:
    return first_document(b"c" * 16, "mail", "pmg", member(1))


def grown(count: int) -> ClusterDocument:
    document = founded()
    for number in range(2, count + 1):
        document = with_member(document, member(number))
    return document


@given(st.integers(1, 8))
def test_round_trip(count: int) -> None:
    document = grown(count)
    assert ClusterDocument.from_json(document.to_json()) == document
    signed = sign(document, 1, KEYS[0])
    again = SignedDocument.unpack(signed.pack())
    assert again == signed
    again.verify(document)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=20))
def test_a_cid_is_never_used_twice(steps: list[tuple[bool, int]]) -> None:
    document, given_out = founded(), {1}
    for grow, pick in steps:
        try:
            if grow:
                document = with_member(document, member(pick % 8 + 1))
                newest = document.max_cid
                assert newest not in given_out
                given_out.add(newest)
            else:
                cids = sorted(document.cids)
                document = without_member(document, cids[pick % len(cids)])
        except MembershipError:
            continue
        assert ClusterDocument.from_json(document.to_json()) == document
        assert document.max_cid >= max(document.cids)


@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        SignedDocument.unpack(data)
    with pytest.raises(ProtocolError):
        ClusterDocument.from_json(data)


@given(st.integers(0, 10_000))
def test_a_changed_byte_is_not_accepted(where: int) -> None:
    held = grown(2)
    offered = sign(with_member(held, member(3)), 1, KEYS[0])
    body = bytearray(offered.body)
    body[where % len(body)] ^= 1
    data = SignedDocument(offered.document, bytes(body), 1, offered.signature).pack()
    try:
        # A byte of the serial may make it older; newer, it needs the signature.
        assert not accept_document(held, SignedDocument.unpack(data))
    except PmgsyncError:
        return


def test_what_is_accepted() -> None:
    held = grown(2)
    newer = with_member(held, member(3))
    assert accept_document(held, sign(newer, 1, KEYS[0]))
    with pytest.raises(MembershipError, match="only its master's signature counts"):
        accept_document(held, sign(newer, 2, KEYS[1]))
    assert not accept_document(held, sign(held, 1, KEYS[0])), "not newer"
    assert not accept_document(newer, sign(held, 1, KEYS[0])), "older"


@pytest.mark.parametrize(
    ("change", "signer"),
    [
        ({}, 3),  # who is a member only in the document that is offered
        ({"cluster": b"d" * 16}, 1),
        ({"max_cid": 3, "members": founded().members, "serial": 9}, 9),
        ({"history": (Epoch(1, 2),)}, 1),
        ({"lease_ms": 5_000}, 1),
        ({"max_cid": 1}, 1),
        ({"members": (replace(member(1), role="master"), replace(member(2), name="other"))}, 1),
        ({"members": (replace(member(1), role="master"), replace(member(2), address="192.0.2.9"))}, 1),
        ({"members": (replace(member(1), role="master"), member(2), replace(member(4), cid=2, name="x"))}, 1),
    ],
)
def test_what_is_refused(change: dict[str, object], signer: int) -> None:
    held = grown(2)
    offered = replace(with_member(held, member(3)), **change)  # type: ignore[arg-type]
    with pytest.raises(MembershipError):
        accept_document(held, sign(offered, signer, KEYS[(signer - 1) % 8]))


def test_a_wrong_key_is_refused() -> None:
    held = grown(2)
    with pytest.raises(MembershipError, match="signature"):
        accept_document(held, sign(with_member(held, member(3)), 1, KEYS[1]))


def test_refusals_are_sentences() -> None:
    held = grown(2)
    with pytest.raises(MembershipError, match="called node2 already"):
        with_member(held, replace(member(3), name="node2"))
    with pytest.raises(MembershipError, match=r"address 192\.0\.2\.2"):
        with_member(held, replace(member(3), address="192.0.2.2"))
    with pytest.raises(MembershipError, match="key belongs to member"):
        with_member(held, replace(member(3), curve_key=member(2).curve_key))
    with pytest.raises(MembershipError, match="unable to delete master node"):
        without_member(held, 1)
    with pytest.raises(MembershipError, match="no member has CID 7"):
        without_member(held, 7)


@given(st.binary(min_size=32, max_size=32))
def test_fingerprints(key: bytes) -> None:
    text = format_fingerprint(key)
    assert parse_fingerprint(text) == parse_fingerprint(text.lower().replace(":", "")) == key
    with pytest.raises(MembershipError):
        parse_fingerprint(text[:-1])


@given(st.integers(2, 8))
def test_only_the_master_passes_for_the_master(count: int) -> None:
    document = grown(count)
    assert require_master(document, 1) is document
    for cid in range(2, count + 2):
        with pytest.raises(MembershipError, match=r"not permitted \(not master\)") as refused:
            require_master(document, cid)
        assert refused.value.hint == "run it on node1 (192.0.2.1)"


# -- epochs: `held` is what a node has, `now` what another one has


def signed(document: ClusterDocument, after: SignedDocument | None = None) -> SignedDocument:
    return sign(document, document.master, KEYS[document.master - 1], after=after)


def promoted(
    base: SignedDocument,
    master: int,
    voters: tuple[int, ...] = (),
    *,
    epoch: int = 0,
    forced: bool = False,
    over: tuple[tuple[int, int], ...] = (),
) -> SignedDocument:
    """Return the first document of a new epoch, with these members' votes."""
    epoch = epoch or base.document.epoch + 1
    ballot = base.ballot(epoch, master)
    votes = [ballot.sign(voter, KEYS[voter - 1]) for voter in voters]
    document = new_epoch(
        base.document,
        master,
        epoch=epoch,
        fork=Fork(7, 99),
        when=5,
        reason="test",
        votes=votes,
        forced=forced,
        over=over,
    )
    return signed(document, base)


def test_a_new_epoch_needs_a_majority_or_is_forced() -> None:
    base = signed(grown(3))
    new = promoted(base, 2, (2, 3))
    assert accept_document(base.document, new)
    assert new.document.master == 2
    assert [one.role for one in new.document.members] == ["node", "master", "node"]
    assert new.document.history[-1].fork == Fork(7, 99)
    assert SignedDocument.unpack(new.pack()) == new
    with pytest.raises(MembershipError, match="has the votes of 1 members, expected 2 of 3"):
        accept_document(base.document, promoted(base, 2, (2,)))
    with pytest.raises(MembershipError, match="has the votes of 1 members"):
        accept_document(base.document, promoted(base, 2, (2, 2)))
    assert accept_document(base.document, promoted(base, 2, (), forced=True))


def test_votes_count_for_what_they_name_alone() -> None:
    base, later = signed(grown(3)), signed(with_fence(grown(3), "lease"))
    for wrong in (
        base.ballot(3, 2),
        base.ballot(2, 3),
        later.ballot(2, 2),
        replace(base.ballot(2, 2), cluster=b"x" * 16),
    ):
        votes = [wrong.sign(2, KEYS[1]), wrong.sign(3, KEYS[2])]
        document = new_epoch(base.document, 2, epoch=2, fork=None, when=0, reason="", votes=votes)
        with pytest.raises(MembershipError, match="has the votes of 0 members"):
            accept_document(base.document, signed(document, base))
    right = base.ballot(2, 2)
    stolen = [right.sign(2, KEYS[1]), replace(right.sign(2, KEYS[1]), cid=3)]
    document = new_epoch(base.document, 2, epoch=2, fork=None, when=0, reason="", votes=stolen)
    with pytest.raises(MembershipError, match="has the votes of 1 members"):
        accept_document(base.document, signed(document, base))


def test_who_is_joining_has_no_vote_and_a_witness_is_never_master() -> None:
    document = with_member(
        with_member(grown(2), replace(member(3), state="joining")), replace(member(4), role="witness")
    )
    assert document.voters == {1, 2, 4}
    assert ClusterDocument.from_json(document.to_json()) == document
    base = signed(document)
    with pytest.raises(MembershipError, match="has the votes of 1 members"):
        accept_document(document, promoted(base, 2, (2, 3)))
    assert accept_document(document, promoted(base, 2, (2, 4)))
    for master, why in ((3, "joining"), (4, "a witness"), (9, "not a member")):
        with pytest.raises(MembershipError, match=why):
            promoted(base, master, (2, 4))
    assert with_confirmed(document, 3).voters == {1, 2, 3, 4}
    assert with_confirmed(document, 2) is document


def test_whoever_missed_documents_and_epochs_checks_them_all() -> None:
    """CID 2 was away while two members joined and the master changed twice, by votes of members it has not heard of."""
    away = signed(grown(2))
    base = signed(grown(4))
    second = promoted(base, 3, (1, 3, 4))
    second = signed(with_member(second.document, member(5)), second)
    third = promoted(second, 4, (3, 4, 5), epoch=7)
    assert accept_document(away.document, SignedDocument.unpack(third.pack()))
    assert accept_document(third.document, signed(without_member(third.document, 2), third))
    with pytest.raises(MembershipError, match="cannot be checked"):
        accept_document(away.document, replace(third, bases=third.bases[1:]))
    forged = replace(
        third,
        bases=(
            signed(grown(4)),
            promoted(base, 3, (3,)),
        ),
    )
    with pytest.raises(MembershipError):
        accept_document(away.document, forged)


def test_a_change_that_no_majority_had_gives_way_to_the_next_epoch() -> None:
    base = signed(grown(3))
    unheard = with_member(base.document, member(4))
    new = promoted(base, 2, (2, 3))
    assert accept_document(unheard, new)
    assert not accept_document(new.document, signed(unheard, base))


def test_forced_never_replaces_voted() -> None:
    base = signed(grown(3))
    voted, forced = promoted(base, 2, (2, 3)), promoted(base, 3, (3,), forced=True)
    for _ in range(9):
        forced = signed(with_fence(forced.document, "none"), forced)
    assert not accept_document(voted.document, forced), "a greater serial does not help"
    assert accept_document(forced.document, voted)
    again = promoted(forced, 3, (3,), forced=True)
    for held, offered in ((voted, again), (again, voted)):
        with pytest.raises(SplitBrainError):
            accept_document(held.document, offered)
    # The voted side goes on in a higher epoch: the other follows, for nobody goes to a lower one.
    third = promoted(voted, 2, (1, 2), epoch=4)
    assert accept_document(again.document, third)
    assert not accept_document(third.document, again)


def test_two_forced_epochs_stand_until_it_is_decided() -> None:
    base = signed(grown(3))
    one, two = promoted(base, 2, (), forced=True), promoted(base, 3, (), forced=True)
    assert one.document.max_cid != two.document.max_cid, "each gives out CIDs of its own"
    later = promoted(two, 1, (), forced=True)
    for held, offered in ((one, two), (two, one), (one, later), (later, one)):
        with pytest.raises(SplitBrainError, match="both in force"):
            accept_document(held.document, offered)
    decided = promoted(one, 2, (), epoch=3, forced=True, over=((2, 3),))
    assert accept_document(two.document, decided)
    assert accept_document(one.document, decided)
    with pytest.raises(SplitBrainError):
        accept_document(later.document, decided)


def test_of_two_voted_epochs_the_later_wins() -> None:
    """A candidate that had the votes and was gone before anybody heard its document."""
    base = signed(grown(3))
    lost, new = promoted(base, 2, (2, 3)), promoted(base, 1, (1, 3), epoch=3)
    assert accept_document(lost.document, new)
    assert not accept_document(new.document, lost)


def test_an_older_version_is_read() -> None:
    text = grown(2).to_json().decode()
    for gone in (
        ',"fence":"none"',
        '"fence":"none",',
        '"fence_wanted":"lease",',
        '"lease_ms":10000,',
        ',"state":"member"',
        '"forced":false,',
        '"over":[],',
    ):
        text = text.replace(gone, "")
    assert "state" not in text and "lease" not in text and "forced" not in text
    assert ClusterDocument.from_json(text.encode()) == grown(2)


def test_what_a_later_version_adds_to_the_history_stays() -> None:
    text = grown(2).to_json().replace(b'"forced":false', b'"forced":false,"later":[1,{"x":2}]')
    document = ClusterDocument.from_json(text)
    assert document.history[0].extra == (("later", [1, {"x": 2}]),)
    assert ClusterDocument.from_json(document.to_json()) == document


@pytest.mark.parametrize(
    "change",
    [
        b'"history":[]',
        b'"history":[{"epoch":2,"master":1}]',
        b'"history":[{"epoch":1,"master":2}]',
        b'"history":[{"epoch":1,"master":1},{"epoch":1,"master":1}]',
        b'"history":[{"epoch":1,"master":1,"fork":7}]',
        b'"history":[{"epoch":1,"master":1,"votes":[{"cid":1,"signature":"00"}]}]',
        b'"history":[{"epoch":1,"master":1,"over":[[1]]}]',
        b'"history":[{"epoch":1,"master":1,"forced":1}]',
        b'"history":[7]',
    ],
)
def test_a_history_that_cannot_be_is_refused(change: bytes) -> None:
    body = founded().to_json()
    start = body.index(b'"history":')
    end = body.index(b'"lease_ms"')
    with pytest.raises(ProtocolError):
        ClusterDocument.from_json(body[:start] + change + b"," + body[end:])


# -- keys that are changed


def rekeyed(base: SignedDocument, number: int, old: Ed25519PrivateKey) -> tuple[SignedDocument, Ed25519PrivateKey]:
    """Return the document in which the master has other keys, signed with the old ones, and its new signing key."""
    new = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    master = base.document.master
    changed = with_keys(base.document, master, bytes([number]) * 32, new.public_key().public_bytes_raw())
    return sign(changed, master, old, after=base), new


@given(st.lists(st.booleans(), min_size=1, max_size=10))
def test_whoever_missed_changes_of_the_masters_key_checks_them_all(steps: list[bool]) -> None:
    """True is a change of the master's keys, False any other. From each document every later one is taken."""
    key, line = KEYS[0], [signed(grown(3))]
    for number, rekey in enumerate(steps, 100):
        if rekey:
            document, key = rekeyed(line[-1], number, key)
        else:
            fence = "none" if line[-1].document.fence == "lease" else "lease"
            document = sign(with_fence(line[-1].document, fence), 1, key, after=line[-1])
        line.append(SignedDocument.unpack(document.pack()))
    for here, held in enumerate(line):
        for there, offered in enumerate(line):
            assert accept_document(held.document, offered) == (there > here)
    # What no majority had gives way to a new epoch, also a change of keys; not two of them, or what was before them.
    for here, held in enumerate(line):
        for there, base in enumerate(line):
            new = promoted(base, 2, (2, 3))
            if here <= there or digest(base.body) in held.document.rekeyed or not any(steps[there:here]):
                assert accept_document(held.document, new)
            else:
                with pytest.raises(MembershipError, match="signature"):
                    accept_document(held.document, new)


def test_who_has_the_masters_old_key_changes_nothing() -> None:
    before = signed(grown(3))
    held, key = rekeyed(before, 100, KEYS[0])
    later = sign(with_fence(held.document, "lease"), 1, key, after=held)
    thief = replace(member(8), curve_key=b"t" * 32, sign_key=KEYS[7].public_key().public_bytes_raw())
    mine = with_member(before.document, thief)
    forged = [
        sign(with_fence(later.document, "none"), 1, KEYS[0], after=later),
        sign(replace(mine, serial=99), 1, KEYS[0], after=before),
        # A base that is older than what is held, and an epoch that is made from it by force.
        sign(
            new_epoch(mine, mine.max_cid, epoch=2, fork=None, when=0, reason="", forced=True),
            mine.max_cid,
            KEYS[7],
            after=sign(mine, 1, KEYS[0], after=before),
        ),
    ]
    for offered in forged:
        for one in (held, later):
            with pytest.raises(MembershipError, match="signature"):
                accept_document(one.document, offered)
    earlier = replace(before.document, serial=before.document.serial - 1)
    assert accept_document(earlier, later)
    with pytest.raises(MembershipError, match="not in order"):
        accept_document(earlier, replace(later, bases=(later.bases[0], *later.bases)))


def test_a_key_change_proves_itself() -> None:
    document = grown(3)
    new = Ed25519PrivateKey.from_private_bytes(b"n" * 32)
    change = KeyChange(
        document.cluster, 2, document.members[1].curve_key, b"k" * 32, new.public_key().public_bytes_raw()
    )
    good = change.proof(KEYS[1], new)
    assert KeyChange.read(good, document, 2) == change
    for message, cid, why in (
        (good, 3, "not signed with its old key"),
        (change.proof(KEYS[2], new), 2, "not signed with its old key"),
        (change.proof(KEYS[1], KEYS[2]), 2, "not signed with its new key"),
        ({**good, "curve_key": b"x" * 32}, 2, "not signed"),
        ({**good, "curve_key": b"x"}, 2, "no curve_key of 32 bytes"),
        ({**good, "by_new": None}, 2, "no by_new of 64 bytes"),
        (good, 9, "no member has CID 9"),
    ):
        with pytest.raises(PmgsyncError, match=why):
            KeyChange.read(message, document, cid)
    changed = with_keys(document, 2, change.curve_key, change.sign_key)
    with pytest.raises(MembershipError, match="not signed with its old key"):
        KeyChange.read(good, changed, 2)
    with pytest.raises(MembershipError, match=r"belongs to member node3 \(3\)"):
        with_keys(document, 2, document.members[2].curve_key, change.sign_key)
    joining = with_member(document, replace(member(4), state="joining"))
    for cid in (1, 4):
        with pytest.raises(MembershipError, match="while node 4 is joining"):
            with_keys(joining, cid, change.curve_key, change.sign_key)
    assert cuts_off(document, changed)
    assert cuts_off(document, without_member(document, 2))
    assert not cuts_off(document, joining)
    again = with_host(document, 2, "premium", (("fingerprint", "AA"),))
    assert not cuts_off(document, again)
    assert (again.serial, again.members[1].level) == (document.serial + 1, "premium")
    assert with_host(again, 2, "premium", (("fingerprint", "AA"),)) is again
