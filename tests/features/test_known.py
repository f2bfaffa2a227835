"""When expressions over several outcomes are known, against a loop over rows and outcomes."""

import numpy as np
import polars as pl
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_raw import schema

from features.join.known import Known

WINDOWS = {"click": 10, "buy": 100}
NAMES = {text: name for name in WINDOWS for text in (name, f'"{name}"', f" ({name}) ", f'(("{name}"))')}
EXPRESSIONS = [*NAMES, "NOT click", '"buy" AND "click"', "click_count + buy_count", '("click" = TRUE)']
READS = {text: [name for name in WINDOWS if name in text] for text in EXPRESSIONS}
ROW = st.tuples(st.none() | st.integers(0, 50), *[st.none() | st.integers(0, 9), st.booleans()] * 2)
SCHEMA = schema(
    source={
        "files": "x",
        "key": "id",
        "outcomes": {n: {"files": n, "key": "id", "time": "at", "window": w} for n, w in WINDOWS.items()},
        "times": {"time": "index"},
    },
    event_time="time",
)


def by_hand(row: tuple, expressions: list[str]) -> tuple[int | None, bool]:
    """When the expressions of a row are known, and whether the log ended before: a row has its time and, outcome by outcome,
    after how many seconds it happened and whether its window was open.
    """
    time, after, is_open = (
        row[0],
        dict(zip(WINDOWS, row[1::2], strict=True)),
        dict(zip(WINDOWS, row[2::2], strict=True)),
    )
    known, undecided = [time], False
    for text in expressions:
        for name in READS[text]:
            happened = NAMES.get(text) == name and after[name] is not None
            known.append(None if time is None else time + (after[name] if happened else WINDOWS[name]))
            undecided |= is_open[name] and not happened
    return None if undecided or None in known else max(known), undecided


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(ROW, max_size=6), st.lists(st.sampled_from(EXPRESSIONS), max_size=3, unique=True))
@example([(5, 3, False, None, False)], ["buy", '"click"'])  # the later of the two counts, in either order
@example([(5, None, False, 3, False)], ["click", "buy"])
def test_several_outcomes_are_known_once_the_last_of_them_is(rows: list[tuple], expressions: list[str]) -> None:
    columns = list(zip(*rows, strict=True)) or [[]] * 5
    time = pl.Series(columns[0], dtype=pl.Int64)
    joined, open_windows = {}, {}
    for name, after, is_open in zip(WINDOWS, columns[1::2], columns[2::2], strict=True):
        after_B = pl.Series(after, dtype=pl.Int64)
        joined |= {name: after_B.is_not_null(), f"{name}_time": time + after_B}
        open_windows[name] = np.array(is_open, bool)
    known, undecided = Known(SCHEMA, time, pl.DataFrame(joined), open_windows).since(expressions)
    assert [*zip(known, undecided, strict=True)] == [by_hand(row, expressions) for row in rows]


def test_an_outcome_whose_name_is_a_keyword_is_known_when_it_happens() -> None:
    outcome = {"files": "orders", "key": "id", "time": "at", "window": 100}
    source = {"files": "x", "key": "id", "outcomes": {"order": outcome}, "times": {"time": "index"}}
    ordered = schema(source=source, event_time="time")
    joined = pl.DataFrame({"order": [True, False], "order_time": pl.Series([7, None], dtype=pl.Int64)})
    known, _ = Known(ordered, pl.Series([5, 5]), joined, {}).since(['"order"'])
    assert known.to_list() == [7, 105]
