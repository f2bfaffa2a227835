"""Where a dataset grows: folders of jobs that live or were killed, files that no step reads any more, steps done twice."""

import errno
import fcntl
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ingest_runs import content_of, run

from features.errors import UserError
from pipeline.ingest import job as ingest_job
from pipeline.ingest import schedule
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.messages import Failure, ReadWork, Report, Work
from pipeline.ingest.schedule import Limits
from pipeline.ingest.staging import staging_of
from pipeline.ingest.state import Job
from pipeline.ingest.steps import run_step

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

SIZES = {
    "rows_per_shard": 100,
    "unit_bytes": 8000,
    "bucket_bytes": 20_000,
    "min_joined": 0,
}  # clicks have times of their own


@pytest.fixture
def content(small_content) -> dict[str, Any]:
    """The small log's schema with a window and a history, so that a job has every step there is."""
    content = small_content()
    content["source"]["outcomes"]["click"] |= {"time": "dwell", "columns": {}, "window": "9d", "open_window": "keep"}
    content["source"]["times"]["dwell"] = "index"
    content["bag"]["before"] = {"history": {"user": "user", "item": "item"}}
    content["tasks"] = {"click": {"kind": "binary", "label": "click"}}
    return content


# Folders


def test_only_what_a_killed_job_left_is_removed(tmp_path):
    out = tmp_path / "out"
    killed = [f"out.staging-{number:032x}" for number in (0, 7 << 100)]
    others = [
        "out.staging-mine", "out.staging-", "out.staging-" + "a" * 31, "out.staging-" + "a" * 33, "out.staging-" + "A" * 32,
        "outs.staging-" + "a" * 32, "my-out.staging-" + "a" * 32, "out.staging-" + "a" * 32 + ".bak", "out.old",
    ]  # fmt: skip
    for name in killed + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("content")
    (tmp_path / ("out.staging-" + "b" * 32)).write_text("a file, not a folder")
    with staging_of(out) as folder:
        assert folder.parent == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {*others, "out.staging-" + "b" * 32}
    assert all((tmp_path / name / "file").exists() for name in others)


def test_names_with_the_signs_of_patterns_are_taken_as_they_are(tmp_path):
    other = tmp_path / ("outs.staging-" + "a" * 32)
    other.mkdir()
    killed = tmp_path / ("out*.staging-" + "a" * 32)
    killed.mkdir()
    with staging_of(tmp_path / "out*"):
        assert not killed.exists()
        assert other.exists()


def test_jobs_with_the_same_out_leave_each_others_folders_alone(tmp_path):
    with staging_of(tmp_path / "out") as first:
        with staging_of(tmp_path / "out") as second:
            assert first != second
            assert (first / "scratch").exists()
        assert (first / "scratch").exists()
        assert not second.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["open", "flock"])
def test_a_folder_that_another_job_removes_before_it_is_locked_is_made_again(moment, tmp_path, monkeypatch):
    module = {"open": os, "flock": fcntl}[moment]
    real, left = getattr(module, moment), [2]

    def removed_before(*given: Any) -> Any:
        if left[0]:
            left[0] -= 1
            for folder in tmp_path.iterdir():
                folder.rmdir()
        return real(*given)

    monkeypatch.setattr(module, moment, removed_before)
    with staging_of(tmp_path / "out") as folder:
        monkeypatch.undo()
        assert left == [0]
        with staging_of(tmp_path / "out"):
            assert (folder / "scratch" / "progress").is_dir()  # and locked: the other job leaves it alone


def test_a_folder_is_gone_whatever_ends_the_job(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging_of(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"), staging_of(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("name", ["read", "write"])
def test_nothing_is_committed_where_neither_a_report_nor_that_could_be_written(
    name, small_log, content, tmp_path, monkeypatch
):
    undisturbed = schedule.write_json

    def full(path: Path, written: Any) -> None:
        if path.name in (f"{name}.json", "error.json"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        undisturbed(path, written)

    monkeypatch.setattr(schedule, "write_json", full)
    with pytest.raises(UserError, match="the report of a step could not be written"):
        run(small_log, tmp_path / "out", content, **SIZES)
    assert not [*tmp_path.iterdir()]


# Files from step to step


def test_files_that_no_later_step_reads_do_not_wait_for_the_end(small_log, content, tmp_path, monkeypatch):
    lying: dict[str, set[str]] = {}
    undisturbed = schedule.after

    def watched(
        reports: list[tuple[int, Report | Failure]], job: Job, limits: Limits, step: str
    ) -> Iterator[tuple[int, Work]]:
        yield from list(undisturbed(reports, job, limits, step))
        lying[step] = {path.name.split("-")[0] for path in job.scratch.glob("*-*")}

    monkeypatch.setattr(schedule, "after", watched)
    run(small_log, tmp_path / "out", content, order="time", **SIZES)
    steps = ["read", "join", "scatter_past", "gather_past", "write_state", "label", "merge", "encode", "write"]
    assert list(lying) == steps
    waiting = {"typed", "scattered", "gathered"}
    assert {"later", *waiting} <= lying["gather_past"]
    assert "later" not in lying["write_state"]
    assert not waiting & lying["label"]
    assert "features" in lying["merge"]
    assert not {"features", *waiting} & lying["encode"]
    assert "encoded" in lying["encode"]


def test_all_files_of_a_dataset_are_flushed_to_disk(small_log, content, tmp_path, monkeypatch):
    flushed: set[int] = set()
    undisturbed = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        undisturbed(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    log = shutil.copytree(small_log, tmp_path / "log")
    with (log / "impressions-1.csv").open("a") as file:
        file.write("no row\n")
    run(log, tmp_path / "out", content, max_bad_fraction=0.01, **SIZES)
    folders = ("train", "valid", "test", "state", "dead_letters", "encoders", "schema.yaml")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.relative_to(tmp_path / "out").parts[0] for file in files} >= {*folders}
    assert not [file for file in files if file.stat().st_ino not in flushed]


def run_with_retries(_: PreprocessConfig, job: Job, limits: Limits, units: list[ReadWork]) -> None:
    """As a runner does whose workers die: each element and what follows a step twice, and reports in any order."""
    work: list[tuple[int, Work]] = list(enumerate(units))
    dice = random.Random(0)
    for step in schedule.steps_of(job):
        for number, each in work:
            run_step(job, step, number, each)
        reports = [(number, run_step(job, step, number, each)) for number, each in work]
        dice.shuffle(reports)
        first = list(schedule.after(reports, job, limits, step))
        work = list(schedule.after(dice.sample(reports, len(reports)), job, limits, step))
        assert work == first
        job.cache.clear()  # of another worker


@pytest.mark.parametrize("order", ["shuffled", "time", "input"])
def test_steps_that_are_done_twice_give_the_same_bytes(order, small_log, content, tmp_path, monkeypatch):
    run(small_log, tmp_path / "once", content, order=order, **SIZES)
    monkeypatch.setattr(ingest_job, "run_steps", run_with_retries)
    run(small_log, tmp_path / "twice", content, order=order, **SIZES)
    assert content_of(tmp_path / "twice") == content_of(tmp_path / "once")


def test_a_failed_replacement_through_a_link_leaves_no_folder_beside_either(
    small_dataset, small_log, content, tmp_path
):
    (tmp_path / "disk").mkdir()
    shutil.copytree(small_dataset, tmp_path / "disk" / "data")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    content["weight"] = "city + 1"
    with pytest.raises(UserError, match="weight"):
        run(small_log, tmp_path / "link", content, overwrite=True, min_joined=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert content_of(tmp_path / "disk") == {f"data/{k}": v for k, v in content_of(small_dataset).items()}
