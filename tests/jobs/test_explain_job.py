"""jobs.explain on a trained run: its tables, its file, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from job_calls import Call, assert_one_line

from features.errors import UserError
from models.ranker import ModelConfig
from pipeline.run import explanation
from pipeline.run.run import Run
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

TASKS = ["click", "bought", "dwell"]
FEATURES = ["price", "age", "user", "city", "item", "recent"]


@pytest.fixture(scope="module")
def trained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 2 and 4."""
    run = tmp_path_factory.mktemp("explained") / "run"
    settings = Settings(batch_size=64, lanes=2, epochs=2, max_steps=4, checkpoint_every=2, threads=1)
    model = ModelConfig(fusion={"name": "adatt", "levels": [[8], [4]]}, tower=[4])
    train(TrainConfig(dataset=small_dataset, run=run, model=model, train=settings))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained, tmp_path / "run")
    return Run(tmp_path / "run")


def test_every_feature_and_group_is_explained_and_the_same_again(run: Run, call: Call):
    command = ["explain", f"run={run.path}", "threads=1", "permutations=1", "groups={who: [user, age]}", "buckets=10"]
    said = call(*command)
    assert explanation.read(run, "test", 2) is None
    found = explanation.read(run, "test", 4)
    assert found is not None
    assert sorted(entry.name for entry in found.importance) == sorted([*FEATURES, "who"])
    assert next(entry.features for entry in found.importance if entry.name == "who") == ["user", "age"]
    means = [sum(rise.value or 0 for rise in entry.tasks.values()) / 3 for entry in found.importance]
    assert means == sorted(means, reverse=True)
    assert (found.rows, found.share, found.buckets, found.split) == (300, 1.0, 10, "test")
    assert [(task, figure.metric) for task, figure in found.figures.items()] == [
        ("click", "ne"), ("bought", "ne"), ("dwell", "nrmse")
    ]  # fmt: skip
    for entry in found.importance:
        assert all(rise.low <= rise.value <= rise.high for rise in entry.tasks.values())
    affinity = found.affinity
    assert affinity is not None
    assert (affinity.tasks, affinity.batches, affinity.batch_rows) == (TASKS, 4, 64)
    assert all(affinity.z_TT[t][t] > 0 for t in range(3))
    assert [
        word for word in [*FEATURES, "who", "step on", "Task affinity", "test-00000004.json"] if word not in said
    ] == []
    assert said == call(*command)
    assert explanation.read(run, "test", 4) == found
    assert not run.report.exists()  # nothing has been evaluated


def test_the_report_of_an_evaluated_checkpoint_has_its_explanation(run: Run, call: Call):
    call("evaluate", f"run={run.path}", "threads=1", "step=4")
    words = "Importance of features"
    assert words not in run.report.read_text()
    call("explain", f"run={run.path}", "threads=1", "features=[price]", "affinity_batches=0", "step=2")
    assert words not in run.report.read_text()
    said = call("explain", f"run={run.path}", "threads=1", "features=[price]", "affinity_batches=0", "rows=100")
    assert said.rstrip().endswith(str(run.report))
    assert words in run.report.read_text()
    said = call("evaluate", f"run={run.path}", "threads=1", "step=4")
    assert "Nothing new: these checkpoints have a record" in said
    assert words in run.report.read_text()


def test_the_figures_are_those_of_jobs_evaluate(run: Run, call: Call):
    call("explain", f"run={run.path}", "threads=1", "features=[]", "affinity_batches=0", "step=2", "split=valid")
    call("evaluate", f"run={run.path}", "threads=1", "step=2", "split=valid")
    found = explanation.read(run, "valid", 2)
    assert found is not None
    assert (found.importance, found.affinity) == ([], None)
    record = json.loads(run.eval_metrics.read_text())
    for task, figure in found.figures.items():
        assert figure.value == pytest.approx(record["metrics"][task][figure.metric], rel=1e-9)


def test_the_rows_of_tables_that_the_split_needs_are_enough(run: Run, call: Call):
    start = ["explain", f"run={run.path}", "threads=1", "permutations=1"]
    call(*start)
    found = explanation.read(run, "test", 4)
    explanation.path(run, "test", 4).unlink()
    call(*start, "tables=needed")
    assert explanation.read(run, "test", 4) == found


def test_about_as_many_rows_as_asked_for_are_read(run: Run, call: Call):
    call("explain", f"run={run.path}", "threads=1", "rows=100", "features=[price]", "affinity_batches=0")
    found = explanation.read(run, "test", 4)
    assert found is not None
    assert 60 < found.rows < 140
    assert found.share == pytest.approx(1 / 3)


def test_what_is_wrong_is_said_before_any_work(run: Run, call: Call):
    start = ["explain", f"run={run.path}", "threads=1"]
    assert_one_line(call(*start, "step=3"), "no checkpoint (step 3)", "[2, 4]")
    assert_one_line(call(*start, "features=[pric]"), "no feature pric", "price")
    assert_one_line(call(*start, "groups={a: [usr]}"), "groups.a", "no feature usr")
    assert_one_line(call(*start, "cluster_by=user"), "cluster_by=user", "keep")
    assert_one_line(call(*start, "permutations=0"), "permutations", "greater than or equal to 1")
    assert_one_line(call("explain", "run=nowhere"), "nowhere: no run")
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("batch_size: 64", "batch_size: many"))
    assert_one_line(call(*start), "config.yaml", "train.batch_size")
    assert not (run.path / "explain").exists()


def test_an_explanation_of_another_form_or_behind_a_link_is_refused(run: Run, call: Call, tmp_path: Path):
    call("explain", f"run={run.path}", "threads=1", "features=[price]", "affinity_batches=0")
    file = explanation.path(run, "test", 4)
    whole = json.loads(file.read_text())
    square = {"tasks": ["a", "b"], "batches": 1, "batch_rows": 1, "dense_rate": 0.1, "table_rate": 0.1}
    square |= {"z_TT": [[0.1, None], [0.1, 0.1]], "se_TT": [[None, None], [0.1, 0.1]]}
    file.write_text(json.dumps(whole | {"affinity": square}))
    assert explanation.read(run, "test", 4) is not None
    shapes: list[dict] = [{"se_TT": []}, {"se_TT": [[0.1, 0.1]]}, {"z_TT": [[0.1, 0.1], [0.1]]}, {"tasks": ["a"]}]
    forms: list[dict] = [{"rows": "300"}, {"more": 1}, {"split": "all days"}, {"importance": [{"name": "price"}]}]
    for change in [*forms, *({"affinity": square | shape} for shape in shapes)]:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match="test-00000004"):
            explanation.read(run, "test", 4)
    shutil.move(file, tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="is a link"):
        explanation.read(run, "test", 4)
