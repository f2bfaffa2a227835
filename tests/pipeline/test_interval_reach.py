"""A figure has one interval, wherever it is shown: that of the buckets that have rows of its task."""

from dataclasses import replace
from pathlib import Path

import pytest
from pages_by_hand import METRICS, checked, model, record

from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.follow import EvaluateConfig, Evaluation
from pipeline.evaluation.metrics.evaluated import ALL, Evaluated, with_intervals
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.report import page
from pipeline.evaluation.report.content import Model
from pipeline.evaluation.report.estimates import estimates
from pipeline.evaluation.report.numbers import figure
from pipeline.evaluation.report.reading import model_of
from pipeline.evaluation.tracked import with_bounds
from pipeline.release.scoring import reference, score
from pipeline.run.headline import HEADLINE
from pipeline.run.run import Run
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

FEW = {"buckets": 1000, "by_time": [], "cold_start": False}  # far more than there are rows


@pytest.fixture(scope="module")
def run(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = tmp_path_factory.mktemp("reach") / "run"
    settings = Settings(batch_size=64, lanes=2, epochs=1, max_steps=2, checkpoint_every=1, threads=1)
    shared = ModelConfig(fusion={"name": "shared_bottom", "widths": [8]}, tower=[4])
    return train(TrainConfig(dataset=small_dataset, run=run, model=shared, train=settings))


def check(of: Model, found: Evaluated) -> None:
    """All intervals of a model's page and curves are those of the file of figures."""
    lines = with_intervals(found.figures.filter(slice=ALL))
    known = {(line["task"], line["metric"]): line for line in lines.drop_nulls("low").iter_rows(named=True)}
    bounds = with_bounds(of.last)["bounds"]
    by_record = {key: one for key, one in estimates(replace(of, evaluated=None)).items() if one.low is not None}
    assert by_record.keys() == known.keys()
    for key, one in by_record.items():
        assert one[1:] == pytest.approx((known[key]["low"], known[key]["high"]), rel=1e-9)
    shown = checked(page.run_page(of)).shown()
    for task, kind in of.kinds.items():
        one = by_record[task, HEADLINE[kind]]
        assert bounds[task][HEADLINE[kind]] == pytest.approx(one[1:], rel=1e-9)
        assert f"{figure(one)} after {of.last['rows']} rows" in shown


def test_intervals_of_the_record_of_a_few_rows_are_those_of_its_file(run: Run):
    evaluation = Evaluation(EvaluateConfig(run=run.path, threads=1, **FEW))
    last = list(evaluation.records())[-1]
    of = model_of(evaluation.results())
    assert of.evaluated is not None
    observed = of.evaluated.figures.filter(slice=ALL, metric="rows")["rows"].to_list()
    used = [last["buckets_used"][task][HEADLINE[kind]] for task, kind in of.kinds.items()]
    assert all(1 < buckets <= min(rows, 300) for buckets, rows in zip(used, observed, strict=True))
    check(of, of.evaluated)


def test_intervals_of_the_record_of_a_night_are_those_of_its_figures(run: Run, small_dataset: Path):
    found, last = score(reference(run, None), Dataset(small_dataset), 200, MeasureConfig(**FEW))
    kinds = {name: task.kind for name, task in run.schema().tasks.items()}
    check(Model("night", "all", last["dataset"], kinds, [last], found), found)


@pytest.mark.parametrize(
    ("more", "reach"),  # of Student's t table
    [({}, 2.0930), ({"buckets_used": {"click": {"ne": 3, "auc": 20}}}, 4.3027)],
)
def test_a_record_reaches_as_far_as_students_t_of_its_buckets(more: dict, reach: float):
    last = record(200, buckets=20, **more)
    low, high = METRICS["click"]["ne"] - reach * 0.004, METRICS["click"]["ne"] + reach * 0.004
    assert with_bounds(last)["bounds"]["click"]["ne"] == pytest.approx((low, high), abs=1e-6)
    of = replace(model(), records=[last], evaluated=None)
    assert estimates(of)["click", "ne"][1:] == pytest.approx((low, high), abs=1e-6)
    text = checked(page.run_page(of)).shown()
    assert f"0.8123 [{low:.4f}, {high:.4f}] after 20,000 rows" in text or f"0.812 [{low:.3f}, {high:.3f}] after" in text


def test_bars_of_bins_reach_as_far_as_their_own_buckets():
    row = [0.1, 0.12, 0.004, 50.0]
    for more, reach in (([], 2.0930), ([3], 4.3027)):
        of = replace(model(), records=[record(200, reliability={"click": [row + more]})])
        low, high = 100 * (0.12 - reach * 0.004), 100 * (0.12 + reach * 0.004)
        assert f"mean label 12.0% [{low:.3g}%, {high:.3g}%]" in checked(page.run_page(of)).shown()
