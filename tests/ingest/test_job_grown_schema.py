"""Encoders of another dataset where the schema has grown: what is unchanged keeps its ids and scales, the rest is fitted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingest_runs import no_beam, refused, rows_by_id, run, values_of

from features.fit.reuse import unchanged
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.verify import verify

pytestmark = pytest.mark.integration


def content(**changes: Any) -> dict[str, Any]:
    return {
        "source": {"files": "log.csv", "types": {"price": "float"}, "row_id": "id"},
        "tables": {"item": {"dim": 4}},
        "dense": {"price": {}, "age": {"missing_flag": True}},
        "categorical": {"city": {"dim": 4}, "item": {"table": "item"}},
        "tasks": {"click": {"kind": "binary", "label": "click = '1'"}},
        "split": {"by": "row_index", "modulo": 10, "train": list(range(8)), "valid": [8], "test": [9]},
    } | changes


def write_log(folder: Path, seed: int, cities: str, age: float) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    lines = ["id,price,age,city,item,also,day,click"]
    for number in range(400):
        item, also = rng.integers(0, 9, 2)
        lines.append(
            f"{number},{rng.lognormal():.3f},{rng.normal(age):.2f},{rng.choice(list(cities))},i{item},i{also},"
            f"d{rng.integers(0, 7)},{int(rng.random() < 0.3)}"
        )
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> tuple[Path, Path]:
    return write_log(tmp_path / "first", 1, "abc", 30), write_log(tmp_path / "second", 2, "bcdef", 60)


GROWN: dict[str, Any] = {
    "dense": {"price": {"transform": "log1p"}, "age": {"missing_flag": True}},
    "categorical": {"day": {"dim": 4}, "city": {"dim": 4}, "item": {"table": "item"}, "also": {"table": "item"}},
}


def test_unchanged_features_are_encoded_as_they_were_and_others_are_fitted_on_the_new_rows(logs, tmp_path, caplog):
    caplog.set_level("INFO", "pipeline")
    first, second = logs
    with no_beam():
        run(first, tmp_path / "old", content())
        run(second, tmp_path / "grown", content(**GROWN), encoders={"from": tmp_path / "old"})
        run(second, tmp_path / "fewer", content(), encoders={"from": tmp_path / "old"})
        run(second, tmp_path / "new", content(**GROWN))
    assert (
        f"encoders: 3 features as in {tmp_path / 'old'}; fitted on the train rows of this log: price, day, also"
        in caplog.text
    )
    kept, fitted = rows_by_id(tmp_path / "fewer"), rows_by_id(tmp_path / "new")
    for row, old, new in zip(rows_by_id(tmp_path / "grown"), kept, fitted, strict=True):
        assert {c: row[c] for c in ("age", "age_missing", "city", "item")} == {
            c: old[c] for c in ("age", "age_missing", "city", "item")
        }
        assert {c: row[c] for c in ("price", "day")} == {c: new[c] for c in ("price", "day")}
    assert values_of(tmp_path / "grown", "city") == values_of(tmp_path / "old", "city")
    assert values_of(tmp_path / "grown", "day") == values_of(tmp_path / "new", "day")
    assert list(verify(Dataset(tmp_path / "grown")))


def test_tasks_that_changed_have_scales_of_the_new_rows_beside_features_that_are_all_kept(logs, tmp_path, caplog):
    caplog.set_level("INFO", "pipeline")
    first, second = logs
    same, cost = {"kind": "regression", "label": "price"}, {"kind": "regression", "label": "price * 100"}
    with no_beam():
        run(first, tmp_path / "old", content(dense={"age": {}}, tasks={"same": same, "cost": same}))
        run(
            second,
            tmp_path / "new",
            content(dense={"age": {}}, tasks={"same": same, "cost": cost}),
            encoders={"from": tmp_path / "old"},
        )
    old, new = (Dataset(tmp_path / name).encoders.labels for name in ("old", "new"))
    assert "fitted on the train rows of this log: the scale of task cost" in caplog.text
    assert new["same"] == old["same"]
    assert new["cost"].mean > 10 * old["cost"].mean
    assert values_of(tmp_path / "new", "city") == values_of(tmp_path / "old", "city")


def test_a_feature_of_the_same_name_is_fitted_anew_where_its_column_its_type_or_its_table_changed(
    logs, tmp_path, caplog
):
    caplog.set_level("INFO", "pipeline")
    first, second = logs
    source = content()["source"]
    derived = {
        "source": source | {"derived": {"place": "UPPER(city)"}},
        "categorical": {"city": {"dim": 4, "column": "place"}},
    }
    bare = {"tables": {}, "categorical": {"city": {"dim": 4}, "item": {"dim": 4}}}
    with no_beam():
        run(first, tmp_path / "old", content(**bare))
        for number, (changes, fitted) in enumerate([
            (bare | derived, "city"),
            (bare | {"categorical": {"city": {"dim": 4, "vocabulary": {"min_count": 2}}, "item": {"dim": 4}}}, "city"),
            (bare | {"tables": {"item": {"dim": 4}}, "categorical": {"item": {"table": "item"}}}, "item"),
        ]):  # fmt: skip
            caplog.clear()
            run(second, tmp_path / f"changed {number}", content(**changes), encoders={"from": tmp_path / "old"})
            assert caplog.text.rstrip().endswith(f"of this log: {fitted}"), caplog.text
        assert "has none of this schema's features" in refused(
            second,
            tmp_path / "none",
            content(tables={}, dense={}, categorical={"day": {}}),
            encoders={"from": tmp_path / "old"},
        )


def test_bins_of_a_table_keep_their_edges(logs, tmp_path):
    first, second = logs
    binned = {"tables": {"ages": {"dim": 4, "bins": 4}}, "categorical": {"age_bin": {"column": "age", "table": "ages"}}}
    with no_beam():
        run(first, tmp_path / "old", content(**binned))
        more = binned["categorical"] | {"city": {"dim": 4}}
        run(second, tmp_path / "grown", content(**binned | {"categorical": more}), encoders={"from": tmp_path / "old"})
    edges = [Dataset(tmp_path / name).encoders.edges["ages"] for name in ("old", "grown")]
    assert list(edges[0]) == list(edges[1])
    ids = {row["age_bin"] for row in rows_by_id(tmp_path / "grown")}
    assert len(ids) == 1, "people of 60 are above all edges of people of 30"


def test_a_column_of_another_type_has_other_ids(tmp_path):
    """7 and 007 are one id of an integer, and two of text."""
    known, typed = content(), content()
    typed["source"]["types"]["item"] = "int"
    kept = unchanged(*(Schema.parse(each, where="mine.yaml") for each in (typed, known)))
    assert kept.features == {"price", "age", "city"}
    assert kept.tables == {"city"}


def test_days_of_one_folder_have_one_schema_and_a_grown_one_needs_another_folder(logs, tmp_path):
    first, _ = logs
    (first / "log.csv").rename(first / "log-2026-11-01.csv")
    (first / "log-2026-11-02.csv").write_bytes((first / "log-2026-11-01.csv").read_bytes())
    source = {"source": content()["source"] | {"files": "log-{date}.csv"}}
    with no_beam():
        run(first, tmp_path / "days", content(**source), date="2026-11-01")
        line = refused(first, tmp_path / "days", content(**source | GROWN), date="2026-11-02")
        assert f"encoders.from={tmp_path / 'days' / '2026-11-01'}" in line
        old = {"from": tmp_path / "days" / "2026-11-01"}
        again = refused(first, tmp_path / "days", content(**source | GROWN), date="2026-11-02", encoders=old)
        assert again == line
        run(first, tmp_path / "more", content(**source | GROWN), date="2026-11-02", encoders=old)
    assert values_of(tmp_path / "more/2026-11-02", "city") == values_of(tmp_path / "days/2026-11-01", "city")


def test_what_reads_a_side_table_that_changed_is_fitted_anew_and_goes_on_from_no_state(logs, tmp_path, caplog):
    caplog.set_level("INFO", "pipeline")
    first, second = logs
    for log in logs:
        (log / "items.csv").write_text("item,kind\n" + "".join(f"i{n},00{n % 3}\n" for n in range(9)))
    head, *lines = (second / "log.csv").read_text().splitlines()
    later = [f"{number},{line.split(',', 1)[1]}" for number, line in enumerate(lines, 1000)]
    (second / "log.csv").write_text("\n".join([head, *later]) + "\n")

    def with_table(**changes: Any) -> dict[str, Any]:
        table = {"files": "items.csv", "key": "item", "columns": {"kind": "string"}} | changes
        counter = {"by": "of_kind", "take": "count"}
        return content(
            source=content()["source"]
            | {"tables": {"of": table}, "counters": {"rows": counter}, "times": {"id": "index"}},
            tables={},
            dense={"rows": {"standardize": False}},
            categorical={"city": {"dim": 4}, "kind": {"column": "of_kind", "dim": 4}},
            event_time="id",
        )

    old = {"encoders": {"from": tmp_path / "old"}}
    with no_beam():
        run(first, tmp_path / "old", with_table())
        run(second, tmp_path / "same", with_table(), **old)
        assert (
            min(row["rows"] for row in rows_by_id(tmp_path / "same")) > 90
        )  # goes on from the 400 rows of three kinds
        for number, change in enumerate([{"columns": {"kind": "int"}}, {"by": "also"}]):
            line = refused(second, tmp_path / f"refused {number}", with_table(**change), **old)
            assert f"{tmp_path / 'old'}: rows has another definition in its state" in line
            caplog.clear()
            run(second, tmp_path / f"empty {number}", with_table(**change), state={"from": "empty"}, **old)
            assert min(row["rows"] for row in rows_by_id(tmp_path / f"empty {number}")) == 0
            assert "1 features as in" in caplog.text
            assert caplog.text.rstrip().endswith("of this log: rows, kind"), caplog.text
            assert 1 not in {row["kind"] for row in rows_by_id(tmp_path / f"empty {number}")}  # none is unknown
