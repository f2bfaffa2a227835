"""A hash of strings that is the same on every machine, process and version, without a loop over rows."""

import numpy as np
import pyarrow as pa

# An odd multiplier has an inverse modulo 2**64, so powers can be divided out again.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
KEY_SEED = 11  # of the buckets of keys


def hash_strings(values: pa.Array, seed: int = 0) -> np.ndarray:
    """64-bit hashes of a string array.

    Polynomial over the UTF-8 bytes modulo 2**64, taken from one cumulative sum over the whole buffer
    (the difference of two prefix sums, shifted back by its start), then mixed (Stafford's variant 13 of splitmix64).

    Args:
        values: B strings; the hash of a null is unspecified.
        seed: other seeds give independent hashes.
    Returns: uint64 of shape (B,).
    """
    values = values.cast(pa.large_string())
    offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
    first, last = (int(offsets[0]), int(offsets[-1])) if len(values) else (0, 0)
    data = values.buffers()[2]
    text = (
        np.frombuffer(data, np.uint8)[first:last].astype(np.uint64) + np.uint64(1) if data else np.empty(0, np.uint64)
    )
    starts, lengths = (offsets[:-1] - first), np.diff(offsets).astype(np.uint64)
    with np.errstate(over="ignore"):
        prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(text * _powers(_BASE, len(text)))])
        total = (prefix[offsets[1:] - first] - prefix[starts]) * _powers(_INVERSE, len(text) + 1)[starts]
        return _mix(total + lengths + _mix(np.full(1, seed, np.uint64)))


def hash_integers(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """64-bit hashes of int64 values, uint64 of the same shape; no two values share one."""
    with np.errstate(over="ignore"):
        return _mix(values.astype(np.uint64) + _mix(np.full(1, seed, np.uint64)))


def bucket_of(keys: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each key, text or integer; of a missing one, any."""
    if pa.types.is_integer(keys.type):
        hashes = hash_integers(keys.fill_null(0).to_numpy(), KEY_SEED)
    elif pa.types.is_dictionary(keys.type):
        return (
            bucket_of(keys.dictionary, buckets)[keys.indices.fill_null(0).to_numpy()]
            if len(keys.dictionary)
            else np.zeros(len(keys), int)
        )
    else:
        hashes = hash_strings(keys, KEY_SEED)
    return hash_range_of(hashes, buckets)


def hash_range_of(hashes: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` equal ranges of 64-bit hashes each hash is in."""
    return ((hashes >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def _powers(base: np.uint64, count: int) -> np.ndarray:
    factors = np.full(count, base)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
