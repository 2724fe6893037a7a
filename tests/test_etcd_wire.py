"""Answers of etcd that are read by hand say what the generated code says that they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.etcd_messages import etcdrpc, key_values
from imgsvc.etcd_wire import page

_KeyValue = type(etcdrpc.RangeResponse().kvs.add())

_revisions = st.integers(0, 2**63 - 1)
_items = st.builds(
    _KeyValue,
    key=st.binary(max_size=300),
    value=st.binary(max_size=300) | st.integers(0, 40_000).map(bytes),
    create_revision=_revisions,
    mod_revision=_revisions,
    version=_revisions,
    lease=st.integers(-(2**63), 2**63 - 1),
)
_headers = st.builds(
    etcdrpc.ResponseHeader,
    cluster_id=st.integers(0, 2**64 - 1),
    member_id=st.integers(0, 2**64 - 1),
    revision=_revisions,
    raft_term=st.integers(0, 2**64 - 1),
)
_answers = st.builds(
    etcdrpc.RangeResponse,
    header=_headers,
    kvs=st.lists(_items, max_size=5),
    more=st.booleans(),
    count=st.integers(0, 2**63 - 1),
)
# Fields that a later etcd may have: an integer, 64 bits, a string, and 32 bits, of numbers that nobody has now.
_UNKNOWN = b"\xd0\x3f\x96\x01" + b"\xd1\x3f12345678" + b"\xd2\x3f\x03new" + b"\xd5\x3f1234"


@given(_answers, st.sampled_from([b"", _UNKNOWN]))
def test_says_what_the_generated_code_says(answer: etcdrpc.RangeResponse, unknown: bytes) -> None:
    found = page(unknown + answer.SerializeToString() + unknown)
    assert found.items == key_values(answer.kvs)
    assert found.more == answer.more
    assert (found.revision, found.cluster) == (answer.header.revision, answer.header.cluster_id)


def test_fields_that_are_unknown_in_a_key() -> None:
    item = _KeyValue(key=b"k", value=b"v", create_revision=7, mod_revision=300)
    content = _UNKNOWN + item.SerializeToString()
    assert page(b"\x12" + bytes([len(content)]) + content).items == key_values([item])


@given(_answers.filter(lambda answer: answer.kvs), st.data())
def test_what_is_cut_is_no_page(answer: etcdrpc.RangeResponse, data: st.DataObject) -> None:
    """In the middle of a key it is noticed; between two fields nothing can tell, and HTTP/2 has its own lengths."""
    answer.ClearField("more")
    answer.ClearField("count")
    last = answer.kvs[-1].ByteSize()
    message = answer.SerializeToString()
    if last:
        with pytest.raises((ValueError, IndexError)):
            page(message[: len(message) - data.draw(st.integers(1, last))])


def test_no_answer_at_all() -> None:
    with pytest.raises(ValueError, match="kind 7"):
        page(b"\x0f")
