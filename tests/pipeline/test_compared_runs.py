"""Which evaluations a comparison of checkpoints is of, and how much of their training its page shows."""

from dataclasses import replace
from pathlib import Path

import pytest
from nightly_world import day, encode_day, train_run, write_day

from features.errors import UserError
from pipeline.evaluation.compared_runs import Comparison, comparison
from pipeline.evaluation.follow import EvaluateConfig, evaluate
from pipeline.evaluation.metrics import evaluated
from pipeline.run.run import Run
from pipeline.storage.files import read_lines

OTHER = day(1)
MEASURED = {"threads": 1, "buckets": 10, "by_time": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the first of two days, with checkpoints at 10 and 20, evaluated on either day."""
    work = tmp_path_factory.mktemp("compared")
    for number in (0, 1):
        write_day(work / "log", number, 600 + 200 * number)
        encode_day(work / "log", work / "days", number)
    run = train_run(work / "days", work / "run", last=0, steps=20, log_every=5)
    for days in (None, OTHER):
        assert len(list(evaluate(EvaluateConfig(run=run.path, days=days, **MEASURED)))) == 2
    return run


def compared(run: Run, *names: str, days: str | None = None) -> Comparison:
    return comparison(EvaluateConfig(run=run.path, compare=names or (f"{run.path}", f"{run.path}@10"), days=days))


@pytest.mark.parametrize("days", [None, OTHER])
def test_a_comparison_is_of_the_days_that_are_asked_for_whichever_else_were_evaluated(run: Run, days: str | None):
    found = compared(run, days=days)
    name = str(Path(run.config()["dataset"]) / (days or day(0)))
    assert f"test split of {name}" in found.table
    records = {(line["dataset"], line["step"]): line for line in read_lines(run.eval_metrics)}
    for model, step in zip(found.models, (20, 10), strict=True):
        assert model.evaluated is not None
        assert model.evaluated.provenance.dataset == name
        assert model.evaluated.value("click", "ne") == records[name, step]["metrics"]["click"]["ne"]


def test_the_file_that_is_missing_is_the_one_that_an_evaluation_of_these_days_writes(run: Run, tmp_path: Path):
    files = {path: path.read_bytes() for path in (run.path / "evaluations").glob("test-00000010-*")}
    assert len(files) == 1
    for file, content in files.items():
        file.unlink()
        with pytest.raises(UserError, match=f"step 10 has not been evaluated.*{file.name} is missing.*days=.{OTHER}"):
            compared(run, days=OTHER)
        file.write_bytes(content)


@pytest.mark.parametrize(("key", "value"), [("dataset", "/elsewhere"), ("split", "valid"), ("share", 0.5)])
def test_figures_of_other_rows_than_asked_for_are_refused(run: Run, key: str, value: str | float):
    file = run.path / "evaluations" / "test-00000010.parquet"
    found = evaluated.read(file)
    evaluated.write(replace(found, provenance=found.provenance.model_copy(update={key: value})), file)
    with pytest.raises(UserError, match=f"test-00000010.parquet is of another {key} than asked for. Run python -m"):
        compared(run)
    evaluated.write(found, file)


def test_the_page_of_a_checkpoint_shows_the_records_and_the_training_up_to_it(run: Run):
    for model, step in zip(compared(run).models, (20, 10), strict=True):
        assert [record["step"] for record in model.records] == [10, 20][: step // 10]
        for shown, file in ((model.training, run.train_metrics), (model.progressive, run.progressive)):
            rows = {line["step"]: line["rows"] for line in read_lines(file)}
            assert [line.rows for line in shown] == [rows[s] for s in rows if s <= step]
            assert len(shown) >= step // 10
            assert max(rows) > 10


def test_other_days_are_evaluated_and_compared_once_those_of_the_training_are_gone(run: Run, tmp_path: Path):
    days = Path(run.config()["dataset"])
    before = compared(run, days=OTHER).table
    (days / day(0)).rename(tmp_path / day(0))
    try:
        assert list(evaluate(EvaluateConfig(run=run.path, days=OTHER, **MEASURED))) == []  # they have their records
        assert compared(run, days=OTHER).table == before
    finally:
        (tmp_path / day(0)).rename(days / day(0))
