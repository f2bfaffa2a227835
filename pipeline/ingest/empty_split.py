"""The message for a split without rows: which times or keys the log has, where the split's bounds are, and what to change."""

from features.schema.schema import HashSplit, RowIndexSplit, Schema, Split
from features.schema.splits import TimeSplit
from features.time_units import as_utc

VALID_SHARE, TEST_SHARE = 0.8, 0.9  # of the range of times, where proposed bounds lie


def empty_split(schema: Schema, empty: Split, rows: int, span: list[int]) -> str:
    """One line for the user.

    Args:
        empty: the split.
        rows: of all splits.
        span: first and last event time of those, seconds since 1970.
    """
    split = schema.split
    if isinstance(split, HashSplit):
        why = _hashed(split, empty)
    elif isinstance(split, RowIndexSplit):
        why = _indexed(split, empty)
    else:
        why = _timed(split, empty, span)
    return (
        f"split {empty} is empty: none of {rows:,} rows belongs to it. {why}, or use another dataset's encoders with "
        "encoders.from."
    )


def _timed(split: TimeSplit, empty: Split, span: list[int]) -> str:
    valid_from, test_from = (as_utc(bound.timestamp()) for bound in (split.valid_from, split.test_from))
    bounds = {
        "train": f"train ends before valid_from={valid_from}",
        "valid": f"valid is from valid_from={valid_from} until before test_from={test_from}",
        "test": f"test begins at test_from={test_from}",
    }  # fmt: skip
    first, last = span
    proposed = [as_utc(first + int((last - first) * share)) for share in (VALID_SHARE, TEST_SHARE)]
    such = (
        f", such as valid_from: {proposed[0]} and test_from: {proposed[1]}"
        if len({*proposed, as_utc(first)}) > 2
        else ""
    )
    return (
        f"Event times run from {as_utc(first)} to {as_utc(last)}, and {bounds[empty]}. Move the bounds of split into that "
        f"range{such}"
    )


def _hashed(split: HashSplit, empty: Split) -> str:
    shares = {"train": 1 - split.valid - split.test, "valid": split.valid, "test": split.test}
    shown = ", ".join(f"{name} {share:.4g}" for name, share in shares.items())
    return (
        f"It is by a hash of {split.key}, whose values are shared out as {shown}: too few of them are in the log. Give {empty} "
        "a larger share in split, or split by a key of more values"
    )


def _indexed(split: RowIndexSplit, empty: Split) -> str:
    own = ", ".join(map(str, getattr(split, empty)[:10]))
    return (
        f"It has the rows whose index in their file is {own} modulo {split.modulo}, counted from 0, and the files are shorter. "
        "Change split in the schema"
    )
