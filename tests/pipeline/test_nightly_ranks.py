"""A model of a night that several ranks score together."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from nightly_world import day, encode_day, night, record, train_run, write_day
from polars.testing import assert_frame_equal

from features.errors import OtherRankError, Preempted, UserError
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.release import child, scoring_ranks
from pipeline.release.nightly import nightly
from pipeline.release.scoring import reference, score
from pipeline.release.scoring_ranks import FOLDER, LOG, WORK, Work, score_on_ranks
from pipeline.run.run import Run

MEASURE = MeasureConfig(buckets=20, min_rows=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs and datasets of days 0 and 1, and a run on day 0."""
    root = tmp_path_factory.mktemp("world")
    for number in range(2):
        write_day(root / "log", number, rows=900)
        encode_day(root / "log", root / "days", number)
    train_run(root / "days", root / "run", last=0, steps=20)
    return root


@pytest.fixture
def work(world: Path) -> Work:
    return Work(
        model=reference(Run(world / "run"), None), day=str(world / "days" / day(1)), batch_size=128, measure=MEASURE,
        tables="all", precision="fp32",
    )  # fmt: skip


@pytest.mark.system
def test_figures_are_those_of_one_process_and_an_error_of_a_rank_is_the_nights(world, work, tmp_path):
    alone, of_alone = score(work.model, Dataset(Path(work.day)), work.batch_size, MEASURE)
    together, of_together = score_on_ranks(work, 2, tmp_path)
    assert together.provenance == alone.provenance
    assert_frame_equal(together.figures, alone.figures, abs_tol=1e-6, rel_tol=1e-5)  # float32 of another order of sums
    assert of_together["metrics"]["click"]["ne"] == pytest.approx(of_alone["metrics"]["click"]["ne"], rel=1e-6)
    assert of_together.keys() == of_alone.keys()

    replaced = work.model_copy(update={"model": work.model.model_copy(update={"checkpoint": "0" * 64})})
    with pytest.raises(UserError, match="its checkpoint was replaced while it was judged"):
        score_on_ranks(replaced, 2, tmp_path)
    assert "error (rank 1)" in (tmp_path / LOG).read_text()


@pytest.mark.parametrize(
    ("code", "errors", "error", "message"),
    [
        (1, {}, UserError, r"ended with exit code 1: see .*score\.log"),
        (75, {}, Preempted, "asked to end"),
        (1, {2: "the disk is gone"}, UserError, "^the disk is gone$"),
    ],
)
def test_ranks_that_do_not_end_well(work, tmp_path, monkeypatch, code, errors, error, message):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "error-0").write_text("of an attempt before")

    def call(command: list[str], _: int) -> int:
        assert command[2:4] == ["jobs.launch", "--nproc-per-node=3"]
        for rank, text in errors.items():
            (Path(command[-1]) / f"error-{rank}").write_text(text)
        return code

    monkeypatch.setattr(child, "call", call)
    with pytest.raises(error, match=message):
        score_on_ranks(work, 3, tmp_path)


def test_ranks_of_a_night_on_a_store_are_given_a_folder_of_this_machine(work, memory, monkeypatch):
    folders = []

    def call(command: list[str], _: int) -> int:
        folders.append(Path(command[-1]))
        assert (folders[0] / WORK).is_file()
        return 1

    monkeypatch.setattr(child, "call", call)
    with pytest.raises(UserError, match=f"exit code 1: see {memory}/score.log"):
        score_on_ranks(work, 3, memory)
    assert len(folders) == 1
    assert not folders[0].exists()


def test_more_ranks_than_gpus_are_refused_before_any_work(world, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring_ranks.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="ranks=3: each takes a GPU, and this machine has 2"):
        nightly(night(world / "log", tmp_path, 1, ranks=3, run=world / "run", days=world / "days"))
    assert not (tmp_path / day(1)).exists()


def test_a_rank_does_not_report_that_another_one_failed(work, tmp_path, monkeypatch):
    (tmp_path / WORK).write_text(work.model_dump_json())
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(scoring_ranks.process_group, "joined", nullcontext)
    for error, reported in ((OtherRankError("lost contact"), []), (UserError("a bad label"), ["error-1"])):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(scoring_ranks, "counted", fail)
        with pytest.raises(SystemExit, match=str(error)):
            scoring_ranks.main()
        assert [p.name for p in tmp_path.glob("error-*")] == reported


def test_a_night_scores_on_the_ranks_it_is_told_and_goes_on_with_others(world, tmp_path, monkeypatch):
    seen = []

    def fake(work: Work, ranks: int, folder: Path):
        seen.append((ranks, folder))
        if ranks == 4:
            raise Preempted("asked to end")
        return score(work.model, Dataset(Path(work.day)), work.batch_size, work.measure)

    monkeypatch.setattr("pipeline.release.steps.score_on_ranks", fake)
    settings = {"run": world / "run", "days": world / "days", "buckets": 20, "by_time": [], "cold_start": False}
    with pytest.raises(Preempted):
        nightly(night(world / "log", tmp_path, 1, ranks=4, **settings))
    nightly(night(world / "log", tmp_path, 1, ranks=2, **settings))
    assert seen == [(4, tmp_path / day(1)), (2, tmp_path / day(1))]
    assert [s["state"] for s in record(tmp_path, 1)["steps"] if s["name"] == "evaluate candidate"][-1] == "done"
    verdict = record(tmp_path, 1)["outcome"]
    assert nightly(night(world / "log", tmp_path, 1, ranks=3, **settings)).night.outcome == verdict
    assert len(seen) == 2  # a night that is judged is not scored again
