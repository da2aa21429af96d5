"""The cluster document: only a newer one, signed by a member, that forgets nothing, replaces the one held."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.membership import (
    ClusterDocument,
    Member,
    SignedDocument,
    accept_document,
    format_fingerprint,
    found_cluster,
    parse_fingerprint,
    require_master,
    sign,
    with_member,
    without_member,
)
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 9)]


def member(number: int) -> Member:
    public = KEYS[number - 1].public_key().public_bytes_raw()
    return Member(number, f"node{number}", f"192.0.2.{number}", 7670, 7671, 7672, bytes([number]) * 32, public)


def founded() -> ClusterDocument:
    return found_cluster(b"c" * 16, "mail", "pmg", member(1))


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
    assert accept_document(held, sign(newer, 2, KEYS[1])), "any member may sign"
    assert not accept_document(held, sign(held, 1, KEYS[0])), "not newer"
    assert not accept_document(newer, sign(held, 1, KEYS[0])), "older"


@pytest.mark.parametrize(
    ("change", "signer"),
    [
        ({}, 3),  # who is a member only in the document that is offered
        ({"cluster": b"d" * 16}, 1),
        ({"max_cid": 3, "members": founded().members, "serial": 9}, 9),
        ({"history": ({"epoch": 1, "master": 2, "fork": None},)}, 1),
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
