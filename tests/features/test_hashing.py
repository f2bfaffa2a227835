"""The hash of strings against plain Python integers."""

import numpy as np
import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.hashing import hash_strings

WORD = (1 << 64) - 1
BASE = 0x9E3779B97F4A7C15


def mixed(x: int) -> int:
    """Finaliser of splitmix64, Stafford's variant 13."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def plain_hash(text: str, seed: int = 0) -> int:
    data = text.encode()
    total = sum((byte + 1) * BASE**place for place, byte in enumerate(data))
    return mixed((total + len(data) + mixed(seed)) & WORD)


TEXTS = st.lists(
    st.one_of(st.none(), st.text(max_size=40), st.sampled_from(["", "a", "ä", "日本語", "🙂" * 9, "\x00"]))
)


@settings(max_examples=examples(150), deadline=None)
@given(
    TEXTS, st.integers(0, 50), st.integers(0, 50), st.sampled_from([pa.string(), pa.large_string()]), st.integers(0, 9)
)
def test_hashes_are_those_of_plain_integers_for_any_slice(texts, start, length, kind, seed):
    values = pa.array(texts, kind).slice(start, length)
    found = hash_strings(values, seed)
    assert found.dtype == np.uint64
    assert len(found) == len(values)
    for text, value in zip(values.to_pylist(), found, strict=True):
        assert text is None or int(value) == plain_hash(text, seed)


def test_a_value_has_one_hash_wherever_it_stands_in_a_long_column():
    rng = np.random.default_rng(0)
    texts = [str(n) * int(k) for n, k in zip(rng.integers(0, 500, 20_000), rng.integers(0, 5, 20_000), strict=True)]
    whole = hash_strings(pa.array(texts))
    parts = pa.chunked_array([texts[:7], texts[7:7], texts[7:9_000], texts[9_000:]], pa.string())
    assert (np.concatenate([hash_strings(chunk) for chunk in parts.chunks]) == whole).all()
    seen = dict(zip(texts, whole.tolist(), strict=True))
    assert [seen[t] for t in texts] == whole.tolist()
    assert all(seen[t] == plain_hash(t) for t in list(seen)[:200])
    assert len(set(seen.values())) == len(seen)


def test_hashes_never_change_between_releases_because_datasets_and_models_hold_them():
    # Of an empty text the sum is 0, and the finaliser keeps 0.
    assert hash_strings(pa.array(["", "a", "user-17", "ä"])).tolist() == [
        plain_hash(t) for t in ("", "a", "user-17", "ä")
    ]
    assert plain_hash("") == 0
    assert plain_hash("a") == mixed(99)


@pytest.mark.parametrize("buckets", [2, 10, 1000])
def test_ids_spread_evenly_over_buckets(buckets):
    found = hash_strings(pa.array([str(i) for i in range(100_000)]))
    for ids in (found % np.uint64(buckets), (found / 2.0**64 * buckets).astype(np.int64)):
        count = np.bincount(ids.astype(np.int64), minlength=buckets)
        expected = 100_000 / buckets
        chi_square = ((count - expected) ** 2 / expected).sum()
        assert abs(chi_square - (buckets - 1)) < 5 * np.sqrt(2 * buckets)


def test_seeds_give_independent_hashes_also_of_keys_that_are_numbers():
    keys = pa.array([str(i) for i in range(100_000)])
    zero, seven = hash_strings(keys, 0), hash_strings(keys, 7)
    assert abs(np.corrcoef(zero / 2.0**64, seven / 2.0**64)[0, 1]) < 0.015
    assert abs(((zero ^ seven) & np.uint64(1)).mean() - 0.5) < 0.01
    # Independent hashes of 100,000 keys have no value in common: a seed must not shift one key's hash to another's.
    for seed in (1, 2, 7):
        assert not np.isin(zero, hash_strings(keys, seed)).any()
