"""Pages as a browser reads them: well-formed, self-contained, with every task, slice and number that they are made of."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hostile_text import HOSTILE, ORDINARY, assert_tame

from features.errors import UserError
from features.printable import has_surrogates, printable
from pipeline.evaluation.metrics import evaluated as stored
from pipeline.evaluation.metrics.evaluated import COLUMNS, Evaluated, Provenance
from pipeline.evaluation.report import heat_map, mixture, page, reading, reliability
from pipeline.evaluation.report.content import (
    Check,
    Estimate,
    Gate,
    Judgement,
    Model,
    Night,
    TrainLine,
    Trend,
    TrendNight,
)
from pipeline.evaluation.report.results import Results
from pipeline.run import explanation, records
from pipeline.run.explanation import Explanation
from pipeline.run.run import Run

VOID = {"meta", "br", "img", "input", "link", "hr"}
KINDS = {"click": "binary", "dwell": "regression"}
METRICS = {
    "click": {"rows": 1000, "weight_sum": 1000.0, "base_rate": 0.1, "ne": 0.8123, "log_loss": 0.26, "auc": 0.71,
              "calibration": 1.04, "ece": 0.01},
    "dwell": {"rows": 100, "weight_sum": 100.0, "label_mean": 2.0, "mse": 4.0, "nrmse": 0.93, "r2": 0.14, "calibration": 0.99},
}  # fmt: skip


class Parsed(HTMLParser):
    """A page's elements; fails on one that is not closed, or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost tag, text
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def values(self, name: str) -> list[str]:
        return [found[name] or "" for _, found in self.elements if name in found]

    def shown(self) -> str:
        return "\n".join(text for tag, text in self.texts if tag not in ("style", "script"))


def checked(text: str) -> Parsed:
    """A page's elements, once all that holds of every page is asserted."""
    assert_tame(text)
    parsed = Parsed(text)
    ids = parsed.values("id")
    assert len(set(ids)) == len(ids)
    assert all(link.startswith("#") or re.fullmatch(r"\./[^:]*", link) for link in parsed.values("href"))
    assert {link[1:] for link in parsed.values("href") if link.startswith("#")} == set(ids)
    assert not any(name in ("src", "style", "srcset", "action") or name.startswith("on")
                   for _, found in parsed.elements for name in found)  # fmt: skip
    assert not re.search(r"https?:|@import|url\(", text)
    [policy] = [found["content"] for tag, found in parsed.elements if found.get("http-equiv")]
    for tag in ("style", "script"):
        [inner] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    for tag, found in parsed.elements:
        if tag == "svg":
            assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", found["viewbox"] or "")
        assert not any(
            "nan" in (value or "").split() for name, value in found.items() if name in ("x", "y", "cx", "cy")
        )
    return parsed


def figures(metrics: dict[str, dict[str, float]], slices: list[str], shift: float = 0.0) -> Evaluated:
    lines: list[tuple[Any, ...]] = []
    for task, found in metrics.items():
        for number, name in enumerate(["all", *slices]):
            for metric, value in found.items():
                size = found["rows"] / (number + 1)
                part = size if metric in ("rows", "weight_sum") else value * (1 + 0.03 * number)
                left = [] if metric in ("rows", "weight_sum") else [part + shift + 0.001 * (k % 5) for k in range(20)]
                lines.append(
                    (task, metric, name.split("=")[0], name, int(size), part + shift * bool(left), 0.004, left)
                )
    provenance = Provenance(run="r", step=200, checkpoint="c", dataset="/d", split="test", cluster="user", buckets=20)
    return Evaluated(pl.DataFrame(lines, schema=COLUMNS, orient="row"), provenance)


def record(step: int, metrics: dict[str, dict[str, float]] = METRICS, **further: Any) -> dict[str, Any]:
    bins = [[0.01 * (b + 1), 0.011 * (b + 1), 0.002, 50.0] for b in range(20)]
    gates = [[[0.7, 0.2, 0.1], [0.1, -0.3, 1.2]]]
    names = [{"units": ["click", "dwell"], "experts": ["click", "dwell", "shared"]}]
    return {
        "step": step, "rows": 100 * step, "checkpoint": "c", "split": "test", "dataset": "/d", "metrics": metrics,
        "buckets": 20, "intervals": {task: {"ne": 0.004, "nrmse": 0.01} for task in metrics},
        "reliability": {"click": bins, "dwell": []},
        "gates": gates, "gate_names": names, "lag": {"steps": 3, "seconds": 1.5}, "rows_evaluated": 1000, "rows_per_s": 5e4,
        "seconds": 0.2, "time": 1.7e9, "ranks": 1, "ranking": "exact", "cluster": "user", "share": 1.0, **further,
    }  # fmt: skip


def model(
    name: str = "adatt", slices: tuple[str, ...] = ("device=mobile", "day=2026-11-08"), shift: float = 0.0
) -> Model:
    training = [
        TrainLine(100 * s, {"click": 0.9}, {"dwell": 0.8}, {"lr": 0.01, "rows_per_s": 1e4}) for s in range(1, 201, 10)
    ]
    return Model(
        name, "test", "/d", KINDS, [record(100), record(200)], figures(METRICS, list(slices), shift),
        {"click": {"ne": 0.79}, "dwell": {"nrmse": 0.9}}, training, [training[-1]],
        {"model": {"fusion": {"name": name, "levels": [[4]]}}, "train": {"seed": 7, "epochs": 1}}, "./data.card.html",
    )  # fmt: skip


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


def test_a_task_is_good_only_where_its_whole_interval_is_below_the_mean_label():
    near = {**METRICS, "click": METRICS["click"] | {"ne": 0.997}}
    of = replace(model(), records=[record(200, near)], evaluated=None)
    assert "1 of 2 tasks is better than predicting the mean label" in checked(page.run_page(of)).shown()
    assert "2 of 2 tasks are better" in checked(page.run_page(model())).shown()


def test_small_slices_and_none_are_told_apart():
    small = {"click": {**METRICS["click"], "rows": 150}}
    of = replace(model(), evaluated=figures(small, ["device=tv"]))  # type: ignore[arg-type]
    assert "No slice has 100 observed rows." in checked(page.run_page(of)).shown()
    assert "kept no figures of slices" in checked(page.run_page(replace(of, evaluated=None))).shown()


def test_a_page_of_a_share_of_a_split_says_so_first():
    of = replace(model(), records=[record(200, share=0.1)])
    assert "10.0% of split test of /d; step 200" in checked(page.run_page(of)).shown()
    assert "Split test of /d; step 200" in checked(page.run_page(model())).shown()


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
        bins = [reliability.Bin(0.01 + (top - 0.01) * b / 19, 0.4, 0.1, 50) for b in range(20)]
        drawn = str(reliability.curve([("m", bins, 2.0)]))
        assert drawn.count("<circle") == 20
        assert drawn.count('class="bar') == 20
    zeros = [reliability.Bin(0.001, 0.0, float("nan"), 50), reliability.Bin(0.5, 0.5, 0.1, 50)]
    assert str(reliability.curve([("m", zeros, 2.0)])).count("<circle") == 2


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


def explanation_of(names: list[str], tasks: list[str], **further: Any) -> Explanation:
    rise = {"value": 0.1, "se": 0.01, "low": 0.08, "high": 0.12}
    importance = [
        {"name": name, "features": [name], "tasks": {task: rise | {"value": 0.1 / (n + 1)} for task in tasks}}
        for n, name in enumerate(names)
    ]
    z_TT: list[list[float | None]] = [
        [0.004 * (i == j) - 0.001 * (i != j) for j in range(len(tasks))] for i in range(len(tasks))
    ]
    affinity = {
        "tasks": tasks, "batches": 19, "batch_rows": 64, "dense_rate": 0.1, "table_rate": 0.1, "z_TT": z_TT,
        "se_TT": [[0.0001] * len(tasks)] * len(tasks),
    }  # fmt: skip
    figures = {task: {"metric": "ne", "value": 0.8} for task in tasks}
    return Explanation.model_validate(
        {
            "run": "r", "step": 200, "checkpoint": "c", "dataset": "/d", "split": "test", "rows": 1234, "share": 0.5,
            "cluster": "user", "buckets": 20, "permutations": 3, "seed": 0, "confidence": 0.9, "figures": figures,
            "importance": importance, "affinity": affinity, **further,
        }
    )  # fmt: skip


def test_what_is_inside_has_importance_with_intervals_and_affinity():
    names = [f"f{n}" for n in range(15)]
    found = explanation_of(names, [*KINDS, "dropped"])
    parsed = checked(page.run_page(replace(model(), explanation=found)))
    shown = parsed.shown()
    for words in (
        "Importance of features, the 12 largest of each task", "click: rise of NE", "f0", "90% interval",
        "1,234 rows of test, 50.0% of its clusters, 20 buckets of user", "the mean of 3 permutations",
        "f0: +0.100 [+0.080, +0.120]", "NE 0.8000 with nothing permuted",
        "click after a step on dwell: −0.10, standard error 0.010",
        "+0.40", "19 batches of 64 rows",
    ):  # fmt: skip
        assert words in shown, words
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert all(cells.count(name) == 1 for name in names)
    assert "dropped: rise" not in shown
    drawn = [text for tag, text in parsed.texts if tag == "text"]
    assert (drawn.count("f11"), drawn.count("f12")) == (2, 0)
    both = checked(page.comparison_page([replace(model(), explanation=found), model("mmoe")], None)).shown()
    assert "adatt: Affinity of tasks" in both
    assert "mmoe: Affinity of tasks" not in both


def test_an_affinity_that_is_unknown_is_a_dash_and_shades_are_of_each_column():
    values = [[0.5, None], [-0.25, 0.001]]
    drawn = Parsed(
        str(heat_map.heat_map(values, ["a", "b"], ["a", "b"], "x", str, lambda r, c: f"{r}{c}", by_column=True))
    )
    fills = [found["fill"] for tag, found in drawn.elements if tag == "rect"]
    assert fills == [heat_map.POSITIVE[-1], heat_map.UNKNOWN, heat_map.NEGATIVE[4], heat_map.POSITIVE[-1]]
    assert [text for tag, text in drawn.texts if tag == "text"] == ["a", "b", "a", "0.5", "–", "b", "-0.25", "0.001"]


def test_names_of_an_explanation_are_text():
    wild = [name for name in HOSTILE if not has_surrogates(name)]
    found = explanation_of([*wild, "</svg><script>x()</script>"], list(KINDS), cluster=wild[0])
    assert sum(tag == "script" for tag, _ in checked(page.run_page(replace(model(), explanation=found))).elements) == 1


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
    {"rows_per_s": "fast"}, {"ranking": "roughly"}, {"share": 0.0}, {"cluster": ["x"]}, {"time": 1e300},
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


def test_the_link_to_a_data_card_is_relative_and_quoted(tmp_path: Path):
    (tmp_path / "run").mkdir()
    dataset = tmp_path / 'da"ta#1'
    assert reading.card_link(tmp_path / "run" / "report.html", str(dataset)) is None
    (tmp_path / 'da"ta#1.card.html').write_text("x")
    assert reading.card_link(tmp_path / "run" / "report.html", str(dataset)) == "./../da%22ta%231.card.html"
    for bad in ("", "\0", "a" * 5000):
        assert reading.card_link(tmp_path / "run" / "report.html", bad) is None
