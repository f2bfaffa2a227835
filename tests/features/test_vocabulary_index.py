"""The index of a vocabulary against Arrow's own look-up, also where hashes are equal, and encoders with and without it."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.fit import vocabulary_index
from features.fit.encoders import Encoders
from features.fit.vocabulary_index import VocabularyIndex
from features.hashing import hash_strings
from features.schema.schema import Schema

TEXTS = st.text(st.sampled_from("abé\U0001f600\0"), max_size=4)
END = np.uint64(2**64 - 1)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(TEXTS, unique=True), st.lists(TEXTS | st.none()), st.sampled_from([0, 1, 3, 1 << 63]), st.integers(1, 5)
)
def test_places_are_those_of_arrow_whatever_hashes_are_equal(vocabulary, wanted, bits, chunk) -> None:
    # Hashes of a few values, among them the largest of all.
    def few(values: pa.Array, seed: int = 0) -> np.ndarray:
        return END - (hash_strings(values, seed) & np.uint64(bits))

    values = pa.array(["before", *vocabulary, "after"], pa.large_string())[1:-1]
    asked = pa.array(["before", *wanted], pa.large_string())[1:]
    expected = pc.index_in(asked, value_set=values).fill_null(-1).to_pylist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_index, "CHUNK", chunk)
        assert VocabularyIndex(values).places(asked).tolist() == expected
        patch.setattr(vocabulary_index, "hash_strings", few)
        assert VocabularyIndex(values).places(asked).tolist() == expected


def test_encoders_with_an_index_give_the_same_ids() -> None:
    schema = Schema.parse(
        {
            "source": {"files": "log.csv"},
            "categorical": {"city": {"vocabulary": {"unknown": 3}}, "plain": {}},
            "tasks": {"click": {"kind": "binary", "label": "click"}},
            "split": {"by": "row_index", "modulo": 1, "train": [0]},
        },
        "index.yaml",
    )
    values = pa.array([f"v{n}" for n in range(100)], pa.large_string())
    encoders = Encoders(schema, {"city": values, "plain": values[:7]}, {}, {})
    indexed = encoders.indexed()
    assert {*indexed.indexes} == {"city", "plain"}
    # Of other values, so that each look-up in an index is seen.
    swapped = replace(encoders, indexes={"city": VocabularyIndex(values.take(pa.array(range(99, -1, -1))))})
    for texts in (["v3", None, "x", "y", "v39", "v3", "", "z"], [f"v{n}" for n in range(0, 100, 3)] + ["x"]):
        codes = pa.array(texts * 3).dictionary_encode()
        for table in ("city", "plain"):
            assert indexed.ids(table, codes).equals(encoders.ids(table, codes))
        # Larger blocks are compared with the vocabulary itself, which is quicker.
        assert swapped.ids("city", codes).equals(encoders.ids("city", codes)) == (len(texts) > 12)
    assert VocabularyIndex(values[:0]).places(values).tolist() == [-1] * 100
