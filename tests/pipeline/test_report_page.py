"""Pages as a browser reads them: well-formed, self-contained, with every task, slice and number that they are made of."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile_text import HOSTILE, ORDINARY
from pages_by_hand import KINDS, METRICS, Parsed, checked, explanation_of, figures, model, record

from features.errors import UserError
from features.printable import has_surrogates, printable
from pipeline.evaluation.metrics import evaluated as stored
from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.evaluation.report import heat_map, mixture, page, reading, reliability
from pipeline.evaluation.report.content import (
    Check,
    Estimate,
    Gate,
    Judgement,
    Model,
    Night,
    Trend,
    TrendNight,
)
from pipeline.evaluation.report.results import Results
from pipeline.run import explanation, records
from pipeline.run.run import Run


def test_the_page_of_a_run_answers_in_order_and_shows_every_task_metric_slice_and_setting():
    parsed = checked(page.run_page(model()))
    questions = [text for tag, text in parsed.texts if tag == "h2"]
    assert questions == [
        "Is it good?", "Is it calibrated?", "Where is it bad?", "How did it get there?", "What is inside?", "What was run?"
    ]  # fmt: skip
    shown = parsed.shown()
    for words in (
        "click", "dwell", "0.8123", "[0.8", "device=mobile", "day=2026-11-08", "best possible", "gap closed", "0.7900",
        "20,000", "model.fusion.name", "train.seed", "jackknife over 20 buckets of user", "2023-11-14 22:13 UTC",
    ):  # fmt: skip
        assert words in shown, words
    assert "./data.card.html" in parsed.values("href")
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert {"0.7100", "1.040", "0.1400"} <= set(cells)
    for group, shown in (("user", False), ("row", False), ("query", True)):
        found = checked(page.run_page(replace(model(), records=[record(200, group=group)]))).shown()
        assert ("each query in one, by itself if of several" in found) == shown


def test_a_slice_has_a_line_a_task_however_many_there_are():
    slices = tuple(f"item={i}" for i in range(40))
    cells = [text for tag, text in checked(page.run_page(model(slices=slices))).texts if tag == "td"]
    large = [name for number, name in enumerate(slices) if 1000 / (number + 2) >= 100]
    assert [cells.count(name) for name in slices] == [
        1 if name in large else 0 for name in slices
    ]  # dwell: all too small


def test_a_change_to_a_baseline_is_paired_and_coloured_where_its_interval_leaves_out_zero():
    ours, theirs = model(), model("mmoe", shift=0.05)
    text = page.run_page(ours, theirs)
    shown = checked(text).shown()
    assert "change to mmoe" in shown
    assert "adatt against mmoe: 2 better, 0 worse, 0 without a clear difference." in shown
    assert 'class="better"' in text
    assert "2 of 5 settings" not in shown
    assert "1 of 4 settings of adatt differ from mmoe." in shown
    assert theirs.evaluated is not None
    apart = replace(
        theirs,
        evaluated=Evaluated(
            theirs.evaluated.figures, theirs.evaluated.provenance.model_copy(update={"split": "valid"})
        ),
    )
    assert "cannot be paired" in checked(page.run_page(ours, apart)).shown()


def test_a_comparison_shows_every_model_and_tells_namesakes_apart():
    models = [model(), model("mmoe", shift=0.01), model("mmoe", shift=-0.01)]
    parsed = checked(page.comparison_page(models, models[1]))
    cells = [text for tag, text in parsed.texts if tag == "td"]
    for name in ("adatt", "mmoe", "mmoe (2)"):
        assert cells.count(name) >= 3
    assert "mmoe (2) against mmoe: 2 better, 0 worse" in parsed.shown()


def test_models_of_unlike_tasks_are_refused():
    other = replace(model("x"), kinds={"click": "binary"})
    with pytest.raises(UserError, match="adatt predicts click, dwell, x predicts click: only models of the same tasks"):
        page.comparison_page([model(), other], None)


@pytest.mark.parametrize("outcome", ["pass", "fail", "undecided"])
def test_a_night_begins_with_its_verdict_gates_and_checks(outcome):
    gates = [
        Gate(
            "no loss", "click", "NE", "device=mobile", Estimate(0.01, 0.004, 0.016), "at most 0.001", outcome, "why not"
        )
    ]
    judgement = Judgement(outcome, "1 of 1 gates decides", gates)
    night = Night("2026-11-09", model(), judgement, model("live", shift=0.05), None,
                  [Check("rows", "pass", "75,000 of about 74,000")], [("preprocess", "12 s")])  # fmt: skip
    parsed = checked(page.night_page(night))
    shown = parsed.shown()
    for words in (
        "2026-11-09",
        "1 of 1 gates decides",
        "no loss",
        "at most 0.001",
        "why not",
        "75,000 of about 74,000",
        "12 s",
    ):
        assert words in shown
    assert f"banner {outcome}" in parsed.values("class")
    order = [shown.index(words) for words in ("1 of 1 gates", "no loss", "75,000 of", "change to live")]
    assert order == sorted(order)


def test_a_trend_has_each_night_and_alarm(tmp_path: Path):
    found = {role: dict.fromkeys(KINDS, Estimate(0.8, 0.79, 0.82)) for role in ("candidate", "serving")}
    nights = [TrendNight(f"2026-11-{day:02d}", "pass", f"run-{day}", "live", found) for day in range(1, 13)]
    page.write_trend(Trend("nights", KINDS, nights, ["click decays by 1%"]), tmp_path / "trend.html")
    parsed = checked((tmp_path / "trend.html").read_text())
    shown = parsed.shown()
    assert "click decays by 1%" in shown
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert [cells.count(night.date) for night in nights] == [1] * 12
    assert cells.index("2026-11-12") < cells.index("2026-11-01")
    page.write_trend(Trend("nights", KINDS, []), tmp_path / "none.html")
    checked((tmp_path / "none.html").read_text())


def test_whatever_the_names_are_they_are_text():
    wild = [name for name in HOSTILE if not has_surrogates(name)]  # such a task cannot be stored
    names = [*wild, *ORDINARY, "{{ 7 * 7 }}", '"><svg onload=x()>', "</style><script>x()</script>"]
    kinds = dict.fromkeys(names, "binary")
    metrics = dict.fromkeys(names, METRICS["click"])
    gate_names = [{"units": names[:2], "experts": names[2:5]}]
    hostile = Model(
        names[0], names[1], names[2], kinds, [record(100, metrics, gate_names=gate_names, cluster=names[9])],
        figures(metrics, names), None, [], [], {names[9]: {names[4]: names[-1]}}, None, [(names[9], names[-1])],
    )  # fmt: skip
    parsed = checked(page.run_page(hostile))
    assert sum(tag == "script" for tag, _ in parsed.elements) == 1
    shown = parsed.shown()
    assert all(printable(name) in shown for name in names)
    gates = [Gate(name, name, name, name, Estimate(1.0), name, "fail", name) for name in names]
    night = Night(
        names[9], hostile, Judgement("fail", names[-1], gates), None, None, [Check(names[9], "fail", names[-1])]
    )
    assert sum(tag == "script" for tag, _ in checked(page.night_page(night)).elements) == 1


@pytest.mark.parametrize("missing", [
    ("evaluated",), ("best",), ("training", "progressive"), ("config",), ("card",), ("evaluated", "best", "training", "config"),
])  # fmt: skip
def test_a_page_can_be_made_without_what_early_versions_did_not_keep(missing):
    empty = {"evaluated": None, "best": None, "training": (), "progressive": (), "config": {}, "card": None}
    old = {key: record(200)[key] for key in ("step", "rows", "checkpoint", "split", "dataset", "metrics")}
    for of in (model(), replace(model(), records=[old])):
        checked(page.run_page(replace(of, **{key: empty[key] for key in missing})))  # type: ignore[arg-type]


def test_training_settings_are_compared_with_the_defaults_where_there_is_no_baseline():
    of = replace(model(), defaults={"seed": 0, "epochs": 1})
    shown = checked(page.run_page(of)).shown()
    assert "1 of 4 settings of adatt differ from the defaults of train." in shown
    assert re.search(r"train.seed\n7\n0\n", shown)
    assert "differ from mmoe" in checked(page.run_page(of, model("mmoe"))).shown()


def test_a_page_of_a_share_of_a_split_says_so_first():
    of = replace(model(), records=[record(200, share=0.1)])
    assert "10.0% of split test of /d; step 200" in checked(page.run_page(of)).shown()
    assert "Split test of /d; step 200" in checked(page.run_page(model())).shown()


@pytest.mark.parametrize(("ranks", "words"), [(1, "1,000, 0.200 s on 1 rank\n"), (2, "1,000, 0.200 s on 2 ranks\n")])
def test_the_ranks_that_evaluated_are_named(ranks: int, words: str):
    assert words in checked(page.run_page(replace(model(), records=[record(200, ranks=ranks)]))).shown()


def test_a_run_without_an_evaluation_says_so():
    assert "No checkpoint has been evaluated yet." in checked(page.run_page(replace(model(), records=[]))).shown()


def test_undefined_metrics_are_dashes():
    undefined = {task: dict.fromkeys(found) for task, found in METRICS.items()}
    nothing = replace(model(), records=[record(1, undefined), record(2, undefined)], evaluated=None)  # type: ignore[arg-type]
    cells = [text for tag, text in checked(page.run_page(nothing)).texts if tag == "td"]
    assert "–" in cells
    assert not {"None", "nan"} & set(cells)


def test_a_reliability_curve_has_a_point_with_an_interval_for_each_bin_on_either_scale():
    for top in (0.02, 0.9):
        bins = [reliability.Bin(0.01 + (top - 0.01) * b / 19, 0.4, 0.1, 50, 2.0) for b in range(20)]
        drawn = str(reliability.curve([("m", bins)]))
        assert drawn.count("<circle") == 20
        assert drawn.count('class="bar') == 20
    zeros = [reliability.Bin(0.001, 0.0, float("nan"), 50, 2.0), reliability.Bin(0.5, 0.5, 0.1, 50, 2.0)]
    assert str(reliability.curve([("m", zeros)])).count("<circle") == 2


def test_a_heat_map_shows_each_weight_beside_its_names():
    mean_UE = [[0.25, 0.75, 0.0], [1.5, -0.5, 0.125]]
    drawn = Parsed(str(mixture.gate_map(mean_UE, ["click", "dwell"], ["click", "dwell", "shared"])))
    tips = [text for tag, text in drawn.texts if tag == "title" and "←" in text]
    assert tips == [
        "click ← click: 0.250", "click ← dwell: 0.750", "click ← shared: 0",
        "dwell ← click: 1.50", "dwell ← dwell: −0.500", "dwell ← shared: 0.125",
    ]  # fmt: skip
    fills = [found["fill"] for tag, found in drawn.elements if tag == "rect"]
    assert fills[4] in heat_map.NEGATIVE
    assert fills[3] == heat_map.POSITIVE[-1]
    shown = [text for tag, text in drawn.texts if tag == "text"]
    assert {"0.25", "0.75", "0.00", "1.50", "−0.50", "0.12"} <= set(shown)


def test_a_task_that_is_not_compared_is_not_shown():
    click = {"click": "binary"}
    models = [replace(model(name), kinds=click) for name in ("adatt", "mmoe")]
    parsed = checked(page.comparison_page(models, models[1]))
    assert "dwell" not in [text for tag, text in parsed.texts if tag in ("td", "h3", "figcaption")]


# Files of a run, which may be untrusted


def run_of(folder: Path, record: dict[str, Any]) -> Results:
    run = Run(folder)
    run.eval_metrics.parent.mkdir(parents=True, exist_ok=True)
    run.eval_metrics.write_text(json.dumps(record) + "\n")
    found = list(records.latest(run, "test", "/d").values())
    return Results(run, "test", "/d", KINDS, found, None)


def test_a_run_is_read_with_its_figures_and_training(tmp_path: Path):
    results = run_of(tmp_path, record(200, evaluation="test-00000200.parquet"))
    stored.write(figures(METRICS, ["device=tv"]), tmp_path / "evaluations/test-00000200.parquet")
    results.run.train_metrics.write_text(
        '{"step": 1, "rows": 10, "lr": 0.5, "ne": {"click": NaN}}\n{"step": 2, "rows": 20}\n'
    )
    found = reading.model_of(results)
    assert found.evaluated is not None
    assert [line.rows for line in found.training] == [10, 20]
    assert found.training[0].rates == {"lr": 0.5}
    assert "device=tv" in checked(page.run_page(found)).shown()
    other = run_of(tmp_path, record(200, evaluation="test-00000200.parquet", checkpoint="trained anew"))
    assert reading.model_of(other).evaluated is None


def test_an_explanation_is_that_of_the_last_checkpoint_on_the_same_rows(tmp_path: Path):
    results = run_of(tmp_path, record(200))
    assert reading.explanation_of(results) is None
    for further, is_shown in (({}, True), ({"checkpoint": "other"}, False), ({"dataset": "/e"}, False)):
        explanation.write(explanation_of(["f"], ["click"], **further), results.run)
        assert (reading.model_of(results).explanation is not None) is is_shown
    (tmp_path / "explain" / "test-00000200.json").write_text("{}")
    with pytest.raises(UserError, match=r"test-00000200.json"):
        reading.model_of(results)


@pytest.mark.parametrize("further", [
    {"evaluation": "../../x.parquet"}, {"evaluation": "/etc/x.parquet"}, {"reliability": 5}, {"reliability": {"click": [[1]]}},
    {"intervals": {"click": {"ne": "x"}}}, {"buckets": 0}, {"lag": [1]}, {"gate_names": [{"units": 3, "experts": []}]},
    {"rows_per_s": "fast"}, {"ranking": "roughly"}, {"share": 0.0}, {"cluster": ["x"]}, {"group": ["x"]}, {"time": 1e300},
])  # fmt: skip
def test_a_record_with_parts_of_another_form_is_refused(tmp_path: Path, further: dict[str, Any]):
    with pytest.raises(UserError, match=r"eval.jsonl, line 1: not a record of an evaluation .*Remove it"):
        run_of(tmp_path, record(200, **further))


@pytest.mark.parametrize("line", ['{"rows": "x"}', '{"ne": {}}', '{"rows": 1, "ne": [1]}', '{"rows": 1, "lr": "x"}'])
def test_a_line_of_training_of_another_form_is_refused(tmp_path: Path, line: str):
    (tmp_path / "train.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"train.jsonl, line 1: not one of training .* Remove it."):
        reading.train_lines(tmp_path / "train.jsonl")


def test_a_long_training_is_thinned_out_evenly(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("".join(f'{{"rows": {i}}}\n' for i in range(9001)))
    rows = [line.rows for line in reading.train_lines(tmp_path / "train.jsonl")]
    assert rows == list(range(0, 9001, 3))


def test_the_link_to_a_data_card_is_relative_and_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run").mkdir()
    dataset = tmp_path / 'da"ta#1'
    assert reading.card_link(tmp_path / "run" / "report.html", str(dataset)) is None
    (tmp_path / 'da"ta#1.card.html').write_text("x")
    assert reading.card_link(tmp_path / "run" / "report.html", str(dataset)) == "./../da%22ta%231.card.html"
    days = tmp_path / "days"
    days.mkdir()
    for day in ("2026-11-02", "2026-11-04", "2026-11-08"):
        (days / f"{day}.card.html").write_text("x")
    named = {"2026-11-01..2026-11-05": "2026-11-04", "2026-11-08": "2026-11-08", "2026-11-02,2026-11-05": "2026-11-02"}
    for name, newest in named.items():
        link = reading.card_link(tmp_path / "run" / "report.html", str(days / name))
        assert link == f"./../days/{newest}.card.html"
    for name in ("2026-11-05", "2026-11-05..2026-11-07"):
        assert reading.card_link(tmp_path / "run" / "report.html", str(days / name)) is None
    for bad in ("", "\0", "a" * 5000):
        assert reading.card_link(tmp_path / "run" / "report.html", bad) is None
    monkeypatch.chdir(days)  # a dataset may be named by "."
    (tmp_path / "days.card.html").write_text("x")
    assert reading.card_link(tmp_path / "run" / "report.html", ".") == "./../days.card.html"
