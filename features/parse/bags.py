"""Bags: lists of ids, from text with separators or from lists, cut to the length that a schema allows."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.schema.kinds import Bag


def listed(values: pa.Array, bag: Bag) -> pa.LargeListArray:
    """Lists of a bag's values as codes into text, without empty ones, cut to its `max_length`; missing is an empty list.

    Args:
        values: B texts with separators, or B lists of text.
    """
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        values = pc.split_pattern(values.cast(pa.large_string()), bag.separator)
    values = values.cast(pa.large_list(values.type.value_type))
    length_B = np.where(values.is_null().to_numpy(False), 0, pc.list_value_length(values.fill_null([])).to_numpy(False))
    flat = values.flatten()
    codes = flat if pa.types.is_dictionary(flat.type) else flat.cast(pa.large_string()).dictionary_encode()
    empty = np.flatnonzero(pc.equal(codes.dictionary, "").to_numpy(False))
    kept_V = codes.indices.is_valid().to_numpy(False)
    if len(empty):
        kept_V &= ~np.isin(codes.indices.fill_null(-1).to_numpy(), empty)
    row_V = np.repeat(np.arange(len(length_B)), length_B)
    if not kept_V.all():
        length_B = np.bincount(row_V[kept_V], minlength=len(length_B))
        row_V, codes = row_V[kept_V], codes.filter(pa.array(kept_V))
    if len(length_B) and length_B.max(initial=0) > bag.max_length:
        start_B = np.cumsum(length_B) - length_B
        codes = codes.filter(pa.array(np.arange(len(row_V)) - start_B[row_V] < bag.max_length))
        length_B = np.minimum(length_B, bag.max_length)
    offsets = np.concatenate([[0], np.cumsum(length_B)]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), codes)
