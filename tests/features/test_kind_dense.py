"""Dense features as cases of test_kinds; more of them in test_encoders and test_numeric_codes."""

import math

from kind_case import Case

CELLS = ["1.5", None, "-20", "1.5", "1e39", "0"]
NUMBERS = [1.5, None, -20.0, 1.5, 0.0]  # without the one beyond float32


def standardized(values: list[float | None], flag: bool) -> list[list[float]]:
    present = [value for value in values if value is not None]
    mean = sum(present) / len(present)
    std = math.sqrt(sum((value - mean) ** 2 for value in present) / len(present))
    rows = [[0.0 if value is None else (value - mean) / std, float(value is None)] for value in values]
    return [row[: 1 + flag] for row in rows]


def logged(value: float | None) -> float | None:
    return None if value is None else math.copysign(math.log1p(abs(value)), value)


BAD = {4: "x: 1e+39 is not a finite number"}
MEAN = sum(value for value in NUMBERS if value is not None) / 4
CASES = [
    Case({}, CELLS, BAD, 1, dense=standardized(NUMBERS, flag=False)),
    Case(
        {"transform": "log1p", "missing_flag": True},
        CELLS,
        BAD,
        1,
        dense=standardized([logged(value) for value in NUMBERS], flag=True),
    ),
    Case({"standardize": False}, CELLS, BAD, 1, dense=[[MEAN if v is None else v] for v in NUMBERS]),
    Case({"piecewise": 2}, CELLS, BAD, 1, dense=standardized(NUMBERS, flag=False)),
]
