"""jobs.compare from a raw log to its tables, and again over complete runs."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml
from job_calls import Call, assert_one_line

from models.automtl.architecture import Space, derive, random_strengths
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.run.run import Run
from pipeline.search import report
from pipeline.search.compare import compare as compare_models
from pipeline.search.compare_config import CompareConfig
from pipeline.search.trained import Jobs, Trainings
from pipeline.storage.files import append_line, make_folder, write_json

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def conf(small_log: Path, small_content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data group and a recipe of the user's own."""
    folder = tmp_path_factory.mktemp("conf")
    content = {"input": str(small_log), "schema": small_content()}
    train = {"batch_size": 64, "lanes": 4, "epochs": 3, "log_every": 3}
    for name, text in (
        ("data", yaml.safe_dump(content)),
        ("recipe", "# @package _global_\n" + yaml.safe_dump({"train": train})),
    ):
        (folder / name).mkdir()
        (folder / name / "mine.yaml").write_text(text)
    return folder


def arguments(conf: Path, folder: Path, *more: str) -> list[str]:
    words = [f"--config-dir={conf}", "data=mine", f"folder={folder}", "recipe_name=mine"]
    return [*words, "models=[shared_bottom,mmoe]", "seeds=2", *more]


def cells(table: str) -> dict[str, dict[str, str]]:
    """Model → column → cell of a table in github style."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def shown(values: list[float]) -> str:
    """Mean and deviation as the tables have them, of numbers below 1."""
    parts = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return "±".join(f"{part:.4f}".removeprefix("0") for part in parts)


@pytest.mark.system
def test_models_are_compared_once_and_the_tables_are_those_of_their_runs(
    conf: Path, tmp_path: Path, call: Call
) -> None:
    """The first time by a process of its own, then in this one."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.compare", *arguments(conf, out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "compare.json").read_text())
    models = ["shared_bottom", "mmoe", "boosted trees", "R-MTGB"]
    assert list(results) == models
    frame = pl.read_parquet(out / "compare.parquet")
    quality, cost, early = map(cells, (out / "compare.md").read_text().strip().split("\n\n"))
    assert list(quality) == list(cost) == models
    columns = {"AUC click": ("click", "auc"), "NE bought": ("bought", "ne"), "NRMSE dwell": ("dwell", "nrmse")}
    for model in models:
        rows = frame.filter((pl.col("model") == model) & (pl.col("at") == "chosen"))
        for column, (task, metric) in columns.items():
            values = rows.filter(pl.col("task") == task).sort("seed")[metric].to_list()
            assert values == [run["metrics"][task][metric] for run in results[model]]
            assert quality[model][column] == shown(values)
        bought = rows.filter(pl.col("task") == "bought")
        gap = f"{bought['difference_percent'][0]:+.2f} ±{bought['half_interval_percent'][0]:.2f}"
        assert quality[model]["NE % bought"] == ("" if model == "shared_bottom" else gap)
        flops = bought["flops_per_row"][0]
        assert cost[model]["FLOPs/row"] == ("" if flops is None else f"{flops:,.0f}")
    for seed, run in enumerate(results["mmoe"]):  # what jobs.evaluate recorded of the chosen checkpoint
        lines = map(json.loads, (out / f"mmoe-{seed}" / "metrics" / "eval.jsonl").read_text().splitlines())
        [recorded] = [r["metrics"] for r in lines if (r["split"], r["step"]) == ("test", run["step"])]
        assert run["metrics"] == recorded
    shown_on_page = (out / "compare.html").read_text()
    assert "mmoe against shared_bottom:" in shown_on_page
    assert "Seed 0 of each model" in shown_on_page
    ne = {
        model: statistics.mean(run["early"]["3/7"]["click"]["ne"] for run in results[model])
        for model in ("mmoe", "shared_bottom")
    }
    assert list(early) == ["mmoe"]
    assert early["mmoe"]["click 3/7"] == f"{100 * (ne['mmoe'] / ne['shared_bottom'] - 1):+.2f}"
    assert all(
        cell in done.stdout for table in (quality, cost, early) for row in table.values() for cell in row.values()
    )

    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoints/*/manifest.json")}
    assert len(kept) == 4 * 5  # an epoch's, and those after 1/7 and 3/7
    assert call("compare", *arguments(conf, out)) == done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    other = call("compare", *arguments(conf, out, 'overrides=["train.dense.lr=0.1"]'))
    assert_one_line(other, "made with another recipe or overrides")


def test_a_baseline_that_is_not_compared_is_refused(conf: Path, tmp_path: Path, call: Call) -> None:
    said = call("compare", *arguments(conf, tmp_path / "out", "baseline=ple"))
    assert said == "error: baseline=ple is not one of models: shared_bottom, mmoe"


class DrawnArchitectures(Jobs):
    """Runs all jobs but jobs.search, of which it draws the architecture; 36 s of training where it is not random."""

    def run(self, module: str, *arguments: str, log: Path | None = None) -> None:
        if module != "jobs.search":
            return super().run(module, *arguments, log=log)
        words = dict(word.split("=", 1) for word in arguments)
        run, space = (
            Run(Path(words["run"])),
            Space(["skip"], ["mlp_16", "mlp_32"], ["click", "bought", "dwell"], 4, 2, 1),
        )
        found = derive(random_strengths(space, 2, 2, int(words["train.seed"])), space)
        (run.path / "architecture.yaml").write_text(yaml.safe_dump(found.model_dump(exclude={"strengths"})))
        if words.get("search.method") != "random":
            make_folder(run.train_metrics.parent)
            append_line(run.train_metrics, {"step": 1, "rows": 72, "rows_per_s": 2.0})
            write_json(run.path / "status.json", {"state": "finished", "step": 1, "steps": 1, "time": 0.0})
        return None


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def core_seconds(run: Path) -> float:
    """Of a run of one rank."""
    rows = [0, *(line["rows"] for line in lines(run / "metrics" / "train.jsonl"))]
    rates = [line["rows_per_s"] for line in lines(run / "metrics" / "train.jsonl")]
    return sum((after - before) / rate for before, after, rate in zip(rows, rows[1:], rates, strict=False))


def test_the_best_of_the_drawn_architectures_on_valid_is_beside_the_one_that_was_searched(
    conf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_json(make_folder(out) / "automtl_random-0.json", {"hours": 1.0, "number": 2})
    models = ["automtl", "automtl_random"]
    config = CompareConfig(
        folder=out, models=models, recipe_name="mine", seeds=1, trees=[], overrides=["model.tower=[4]"]
    )
    entries, kinds = compare_models(config, DrawnArchitectures(["data=mine"], [f"--config-dir={conf}"]))
    searched, drawn = entries
    ranking = {"binary": "auc", "regression": "r2"}
    best = {}
    for number in range(2):
        run = out / f"automtl_random-0-{number}"
        drawn_file = out / f"search-automtl_random-0-{number}" / "architecture.yaml"
        fusion = yaml.safe_load((run / "config.yaml").read_text())["model"]["fusion"]
        assert fusion["architecture"] == yaml.safe_load(drawn_file.read_text())
        regular = [r for r in lines(run / "metrics" / "eval.jsonl") if r["split"] == "valid" and r["step"] % 5 == 0]
        assert len(regular) == 3, regular  # an epoch's each; patience does not end before
        best[run.name] = max(
            statistics.mean(r["metrics"][task][ranking[kind]] for task, kind in kinds.items()) for r in regular
        )
    [record] = drawn.runs
    assert record["run"] == max(best, key=lambda name: best[name])
    [other] = {*best} - {record["run"]}
    assert {line["split"] for line in lines(out / other / "metrics" / "eval.jsonl")} == {"valid"}  # test chose nothing
    assert str(drawn.rows[0]).startswith(str(out / record["run"]))
    spent = {name: core_seconds(out / name) / 3600 for name in (*best, "automtl-0")}
    assert record["hours"] == pytest.approx(sum(spent[name] for name in best), rel=1e-9)
    assert searched.runs[0]["hours"] == pytest.approx(0.01 + spent["automtl-0"], rel=1e-9)
    assert [entry.runs[0]["search_hours"] for entry in entries] == [pytest.approx(0.01), None]
    assert all(entry.cost["flops_per_row"] > 0 for entry in entries)
    report.write(entries, entries[0], kinds, out)
    _, cost, _ = map(cells, (out / "compare.md").read_text().strip().split("\n\n"))
    assert {name: row["search"] for name, row in cost.items()} == {"automtl": ".0100", "automtl_random": ""}
    assert "automtl_random" in (out / "compare.html").read_text()


TINY_SPACE = ["width=4", "token_dim=2", "experts=2", "depth=1", "chosen=1", "interaction=[product_inner,skip]"]


def test_no_test_row_is_read_by_a_search_or_a_draw_nor_by_the_training_of_what_they_found(
    conf: Path, small_dataset: Path, tmp_path: Path
) -> None:
    spaces = [f"space.{word}" for word in (*TINY_SPACE, "blocks=[mlp_16,skip]")]
    found = {}
    for name in ("whole", "destroyed"):
        data = Path(shutil.copytree(small_dataset, tmp_path / name / "data"))
        dataset = Dataset(data)
        if name == "destroyed":
            for shard in dataset.shards("test"):
                (data / shard.path).write_bytes(bytes(shard.bytes))
            loader = Loader(dataset, "test", 32)
            with pytest.raises(Exception, match=r"parquet|Parquet|magic"):
                list(loader.batches(loader.start()))
        out = make_folder(tmp_path / name / "out")
        write_json(out / "automtl_random-0.json", {"hours": 1.0, "number": 1})
        config = CompareConfig(
            folder=out, models=["automtl", "automtl_random"], recipe_name="mine", seeds=1,
            search_overrides=["train.epochs=2", *spaces],
        )  # fmt: skip
        trainings = Trainings(config, Jobs([], [f"--config-dir={conf}"]), dataset)
        trained = trainings.of("automtl", 0)
        [search] = trained.searches
        assert 0 < (trained.search_hours() or 0) < trained.hours()
        drawn = trainings.of("automtl_random", 0).candidates if name == "destroyed" else []
        assert all(yaml.safe_load((run / "status.json").read_text())["state"] == "finished" for run in drawn)
        losses = [line["loss"] for line in lines(trained.candidates[0] / "metrics" / "train.jsonl")]
        architecture = yaml.safe_load((search / "architecture.yaml").read_text())
        found[name] = (architecture, lines(search / "metrics" / "search.jsonl"), losses)
    assert found["whole"] == found["destroyed"]
