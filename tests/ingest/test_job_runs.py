"""Runs that follow each other: the same again, over a standing dataset, with the encoders of another."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ingest_runs import content_of, refused, rows_by_id, rows_of, run, values_of

from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.verify import verify
from pipeline.ingest import job

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]


SIZES = {"order": "input", "rows_per_row_group": 32, "rows_per_shard": 100}  # those of `small_dataset`


def test_a_run_repeated_gives_the_same_bytes(small_dataset, small_log, small_content, tmp_path):
    run(small_log, tmp_path / "out", small_content(), **SIZES)
    assert content_of(tmp_path / "out") == content_of(small_dataset)


# A dataset that stands already


def test_a_standing_dataset_is_refused_or_replaced_whole_and_outlives_a_failed_replacement(
    small_dataset, small_log, small_content, tmp_path
):
    out = shutil.copytree(small_dataset, tmp_path / "out")
    (out / "train" / "part-99999-of-99999.parquet").write_bytes(b"of another run")
    before = content_of(out)
    assert "exists" in refused(small_log, out, small_content())
    content = small_content() | {"split": {"by": "time", "valid_from": "1970-01-02", "test_from": "1970-02-01"}}
    refused(small_log, out, content, overwrite=True)
    assert content_of(out) == before
    run(small_log, out, small_content() | {"weight": "3"}, overwrite=True)
    after = Dataset(out)
    list(verify(after))
    assert "train/part-99999-of-99999.parquet" not in content_of(out)
    assert set(rows_of(out, "train")["weight"].to_pylist()) == {3.0}
    assert after.manifest.fingerprint != Dataset(small_dataset).manifest.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_overwrite_through_a_link_replaces_what_it_points_to(small_dataset, small_log, small_content, tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.copytree(small_dataset, tmp_path / "disk" / "data")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "data")
    run(small_log, link, small_content() | {"weight": "3"}, overwrite=True, **SIZES)
    assert link.readlink() == tmp_path / "disk" / "data"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["data"]
    assert set(rows_of(tmp_path / "disk" / "data", "train")["weight"].to_pylist()) == {3.0}
    run(small_log, tmp_path / "plain", small_content() | {"weight": "3"}, **SIZES)
    assert content_of(link) == content_of(tmp_path / "plain")


def test_overwrite_leaves_alone_what_is_no_dataset(small_log, small_content, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    assert "is no dataset" in refused(small_log, tmp_path / "thesis", small_content(), overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_a_changed_or_missing_shard_is_named(small_dataset, tmp_path):
    out = shutil.copytree(small_dataset, tmp_path / "out")
    path = out / "train" / "part-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"part-00001-of-00003\.parquet: checksum"):
        list(verify(Dataset(out)))
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"part-00001-of-00003\.parquet has .* bytes, the manifest says"):
        Dataset(out)
    path.unlink()
    with pytest.raises(UserError, match=r"part-00001-of-00003\.parquet is missing"):
        Dataset(out)


# The encoders of another dataset


def raw_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def later_log(small_log, tmp_path_factory) -> Path:
    """Three rows of the small log's last day, in other cities and dearer."""
    folder = tmp_path_factory.mktemp("later")
    shutil.copy(small_log / "clicks-1.csv", folder)
    rows = raw_rows(small_log / "impressions-3.csv")[:3]
    changed = [row | {"city": city} for row, city in zip(rows, ["Atlantis", "Köln", "NA"], strict=True)]
    write_rows(folder / "impressions-9.csv", changed)
    return folder


def test_given_encoders_are_used_as_they_are(small_dataset, later_log, small_content, tmp_path):
    settings = {"encoders": {"from": small_dataset}, "max_bad_fraction": 1}
    manifest = run(later_log, tmp_path / "out", small_content(), **settings)
    assert manifest.rows == {"train": 0, "valid": 0, "test": 3}
    assert content_of(tmp_path / "out" / "encoders") == content_of(small_dataset / "encoders")
    known = {value: i for i, value in values_of(small_dataset, "city").items()}
    found = rows_by_id(tmp_path / "out")
    assert [row["city"] for row in found] == [1, known["Köln"], 0]
    for row, before in zip(found, rows_by_id(small_dataset)[600:], strict=False):
        assert {**row, "city": 0} == {**before, "city": 0, "label.dwell": row["label.dwell"]}

    labels = small_content() | {"weight": "2"}  # other labels and weights of the same features
    assert run(later_log, tmp_path / "labels", labels, **settings).rows == manifest.rows
    assert Dataset(tmp_path / "labels").encoders_id == Dataset(small_dataset).encoders_id


def test_given_encoders_are_those_of_the_folder_in_which_the_job_was_started(
    small_dataset, later_log, small_content, tmp_path, monkeypatch
):
    """Workers may stand in another one, where the same relative path names nothing."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    undisturbed = job.run_steps

    def run_elsewhere(*given: Any) -> None:
        monkeypatch.chdir(elsewhere)
        undisturbed(*given)

    monkeypatch.setattr(job, "run_steps", run_elsewhere)
    monkeypatch.chdir(small_dataset.parent)
    run(later_log, tmp_path / "out", small_content(), encoders={"from": small_dataset.name})
    assert content_of(tmp_path / "out" / "encoders") == content_of(small_dataset / "encoders")
    assert "drift" in json.loads((tmp_path / "out" / "statistics.json").read_text())


def test_encoders_of_another_schema_or_none_are_refused(small_dataset, later_log, small_content, tmp_path):
    other = small_content() | {"tables": {}, "dense": {}, "bag": {}, "categorical": {"place": {"column": "city"}}}
    message = refused(later_log, tmp_path / "no", other, encoders={"from": small_dataset})
    assert message.startswith(f"encoders.from: {small_dataset} has none of this schema's features.")
    assert "no dataset (manifest.json is missing)" in refused(
        later_log, tmp_path / "no", small_content(), encoders={"from": later_log}
    )


def test_statistics_say_how_far_a_log_drifted_from_that_of_its_encoders(
    small_dataset, small_log, small_content, tmp_path
):
    folder = shutil.copytree(small_log, tmp_path / "log")
    for name in ("impressions-1.csv", "impressions-3.csv"):
        rows = raw_rows(folder / name)
        # Half of the rows in a city that is new, all of them old; items as they were.
        changed = [row | {"age": "90", "city": row["city"] if i % 2 else "Atlantis"} for i, row in enumerate(rows)]
        write_rows(folder / name, changed)
    same, moved = tmp_path / "same", tmp_path / "moved"
    run(small_log, same, small_content(), encoders={"from": small_dataset})
    run(folder, moved, small_content(), encoders={"from": small_dataset})

    def drift(out: Path) -> dict[str, dict[str, Any]]:
        return {x["feature"]: x for x in json.loads((out / "statistics.json").read_text())["drift"]}

    assert "drift" not in json.loads((small_dataset / "statistics.json").read_text())
    before, after = drift(same), drift(moved)
    assert before.keys() == after.keys() >= {"age", "city", "item", "price"}
    assert after["age"]["psi"] > 0.25 > before["age"]["psi"]
    assert after["city"]["psi"] > before["city"]["psi"] + 0.25
    assert after["item"]["psi"] == before["item"]["psi"] < 0.1
    # Rows in Atlantis, and those of "day 1 only" and "day 2 only", which were not there in training either.
    cities = [row["city"] for row in rows_by_id(moved)]
    share = sum(city == 1 for city in cities) / sum(city != 0 for city in cities)
    assert after["city"]["unknown"] == pytest.approx(share, abs=1e-9)
