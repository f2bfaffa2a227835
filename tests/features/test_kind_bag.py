"""Bags from text and from lists, against loops over rows; CASES are those of test_kinds."""

import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_case import Case, ids_by_frequency
from test_hashing import plain_hash

from features.errors import UserError
from features.kinds.bag import Bag, listed

ITEM = st.sampled_from(["a", "b", "ä", "", " ", "日本", "a b", "."])
LENGTHS = st.sampled_from([1, 2, 3, 50])


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(st.none() | st.text("ab|,.ä ", max_size=9), max_size=12), st.sampled_from(["|", ",", ", ", "."]), LENGTHS
)
def test_a_text_is_the_list_of_what_its_separators_leave_between_them(texts, separator, length):
    bag = Bag(separator=separator, max_length=length)
    expected = [[item for item in (text or "").split(separator) if item][:length] for text in texts]
    for values in (pa.array(texts, pa.large_string()), pa.array(texts, pa.string()).dictionary_encode()):
        found = listed(values, bag, "here")
        assert found.to_pylist() == expected
        assert found.type == pa.large_list(pa.dictionary(pa.int32(), pa.large_string()))


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(st.none() | st.lists(st.none() | ITEM, max_size=5), max_size=12),
    LENGTHS,
    st.sampled_from([pa.list_, pa.large_list]),
    st.sampled_from([pa.string(), pa.large_string()]),
    st.integers(0, 3),
)
def test_a_list_keeps_its_items_but_for_empty_and_missing_ones(lists, length, kind, item, start):
    found = listed(pa.array(lists, kind(item)).slice(start), Bag(max_length=length), "here")
    assert found.to_pylist() == [[i for i in row or [] if i][:length] for row in lists[start:]]


def test_what_lies_behind_a_missing_list_belongs_to_no_row():
    """Arrow lets a list be missing and still have items in the buffer of all items."""
    items, offsets = pa.array(["a", "b", "c", "d"]), pa.array([0, 1, 3, 4], pa.int32())
    lists = pa.ListArray.from_arrays(offsets, items, mask=pa.array([False, True, False]))
    assert listed(lists, Bag(), "here").to_pylist() == [["a"], [], ["d"]]


def test_items_of_numbers_are_the_text_of_these_numbers():
    for lists in ([[3, 1], None, []], [[3.0, 1.0], None, []]):
        assert listed(pa.array(lists), Bag(), "here").to_pylist() == [["3", "1"], [], []]
    assert listed(pa.array([3.0, None, 1e12]), Bag(), "here").to_pylist() == [["3"], [], ["1000000000000"]]
    assert listed(pa.array(["3.0|1", "a.0|1.0"]), Bag(), "here").to_pylist() == [["3", "1"], ["a.0", "1"]]
    with pytest.raises(UserError, match=r"^here holds 0\.5, which is no id"):
        listed(pa.array([[3.0], [0.5]]), Bag(), "here")


@pytest.mark.parametrize("values", [pa.nulls(3), pa.nulls(3, pa.list_(pa.string())), pa.array(["", None, "|"])])
def test_where_nothing_is_given_a_bag_is_an_empty_list_and_never_missing(values):
    found = listed(values, Bag(), "here")
    assert found.to_pylist() == [[], [], []]
    assert found.null_count == 0


LISTS = [["a", "b", "a", "c"], None, ["b"], ["", "zz", "b"], []]
KEPT = [[item for item in row or [] if item][:3] for row in LISTS]
CASES = [
    Case(
        {"max_length": 3},
        ["|".join(row) if row else None for row in LISTS],
        ids=[[ids_by_frequency(KEPT)[item] for item in row] for row in KEPT],
        missing=2,
    ),
    Case(
        {"max_length": 3, "hash": 5, "dim": 8},
        LISTS,
        ids=[[1 + plain_hash(item) % 5 for item in row] for row in KEPT],
        missing=2,
    ),
]
