"""Rows whose outcomes may still come: hidden labels and rows that are left out, against a loop over rows."""

import numpy as np
import polars as pl
import pyarrow as pa
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_raw import schema, typed

from features.parse.raw import ROW_ID, column, parse
from features.schema.schema import Schema


def waiting(click: str, buy: str) -> Schema:
    window = {"key": "id", "time": "at", "window": "1h"}
    return schema(
        source={
            "files": "x",
            "key": "id",
            "outcomes": {
                "click": {"files": "c", "columns": {"dwell": "float"}, "open_window": click, **window},
                "buy": {"files": "b", "open_window": buy, **window},
            },
            "derived": {"long": "click_dwell > 3"},
            "times": {"time": "index"},
        },
        event_time="time",
        tasks={
            "click": {"kind": "binary", "label": "click"},
            "long": {"kind": "binary", "label": "long"},
            "late": {"kind": "regression", "label": "buy_time - time"},
            "stars": {"kind": "binary", "label": "stars = '5'"},
            "clicked": {"kind": "binary", "label": "stars = '5'", "observed_when": "long OR click_count = 0"},
            "buy": {"kind": "binary", "label": "buy", "observed_when": "click"},
        },
    )


READS = {
    "click": {"click"}, "long": {"click"}, "late": {"buy"}, "stars": set(), "clicked": {"click"}, "buy": {"buy", "click"},
}  # fmt: skip
LABELS = dict.fromkeys(READS, 1.0) | {"late": 2.0}  # of every row, where all windows are closed
JOINED = {
    "click": True,
    "click_count": 1,
    "click_time": 6,
    "click_dwell": 5.0,
    "buy": True,
    "buy_count": 1,
    "buy_time": 7,
}
YOUNG = st.sampled_from(["unobserved", "leave_out", "keep"])
ROW = st.fixed_dictionaries({"id": st.sampled_from(["a", "b", None]), "click": st.booleans(), "buy": st.booleans()})


@settings(max_examples=examples(80), deadline=None)
@given(st.fixed_dictionaries({"click": YOUNG, "buy": YOUNG}), st.lists(ROW, max_size=8))
def test_a_window_that_is_still_open_hides_the_tasks_that_read_its_outcome_or_leaves_the_row_out(ways, log):
    """`log` says of each row whether the windows of its outcomes are still open."""
    s = waiting(**ways)
    cells = {name: [value] * len(log) for name, value in (("time", "5"), ("x", "1"), ("stars", "5"))}
    cells["id"] = [row["id"] for row in log]
    rows = typed(s, {name: pa.array(values, pa.string()) for name, values in cells.items()}).rows
    open_windows = {name: np.array([row[name] for row in log], bool) for name in ways}
    found = parse(s, rows, 0, pl.DataFrame({name: [value] * len(log) for name, value in JOINED.items()}), open_windows)

    expected, left_out = [], {f"window of {name} still open": 0 for name in ways if ways[name] == "leave_out"}
    for index, row in enumerate(log):
        open_ = {way: [name for name in ways if row[name] and ways[name] == way] for way in ("unobserved", "leave_out")}
        if row["id"] is None:
            continue  # a bad row, whatever its windows are
        if open_["leave_out"]:
            left_out[f"window of {open_['leave_out'][0]} still open"] += 1
        else:
            hidden = {task for task, reads in READS.items() if reads & set(open_["unobserved"])}
            expected.append((index, {task: None if task in hidden else LABELS[task] for task in READS}))
    assert [(r[ROW_ID], {task: r[f"label.{task}"] for task in READS}) for r in found.rows.to_pylist()] == expected
    assert found.left_out == left_out
    assert found.bad["reason"].to_list() == ["id: missing key"] * cells["id"].count(None)


def test_a_key_may_be_derived_and_where_it_is_missing_the_row_is_bad():
    s = schema(
        source={"files": "x", "key": "pair", "derived": {"pair": "a || '-' || b"},
                "outcomes": {"click": {"files": "c", "key": "id"}}},
        tasks={"t": {"kind": "binary", "label": "click"}},
    )  # fmt: skip
    rows = typed(s, {"x": ["1"] * 3, "a": ["u", "", "v"], "b": ["1", "1", "2"]}).rows
    assert column(s, rows, "pair").to_pylist() == ["u-1", None, "v-2"]
    found = parse(s, rows, 0, pl.DataFrame({"click": [True, False, False]}))
    assert found.rows["label.t"].to_pylist() == [1.0, 0.0]
    assert found.bad.select("line", "reason").rows() == [(5, "pair: missing key")]
