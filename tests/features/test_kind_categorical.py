"""Categorical features as cases of test_kinds; more of them in test_encoders and test_numeric_codes."""

from kind_case import Case, ids_by_frequency
from test_hashing import plain_hash

CELLS = ["b", None, "a", "b", "ä", "c"]
IDS = ids_by_frequency([[cell] for cell in CELLS if cell])
CASES = [
    Case({"dim": 8}, CELLS, missing=1, ids=[[IDS[cell] if cell else 0] for cell in CELLS]),
    Case(
        {"table": "words"}, CELLS, missing=1, ids=[[IDS[c] if c else 0] for c in CELLS], tables={"words": {"dim": 12}}
    ),
    Case({"hash": 7}, CELLS, missing=1, ids=[[1 + plain_hash(cell) % 7 if cell else 0] for cell in CELLS]),
    # Every edge but the last starts a bin: 1, 2 and 3 are the bins of three distinct numbers and two bins.
    Case(
        {"bins": 2},
        ["1", "5", None, "3", "1", "-1e39"],
        {5: "x: -1e+39 is not a finite number"},
        1,
        ids=[[1], [3], [0], [2], [1]],
    ),
]
