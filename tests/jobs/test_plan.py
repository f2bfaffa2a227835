"""jobs.plan: the sizes of tables it goes by, and what it says of what does not fit."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import yaml

from jobs.plan import main
from pipeline.dataset.dataset import Dataset
from pipeline.training.parallel import scaling

DIMS = {"user": 4, "city": 4, "item": 4}
BOUNDED = """
source: {files: "*.csv"}
tables:
  item: {dim: 32, vocabulary: {max_size: 100000, unknown: 3}}
dense: {age: {piecewise: 6}}
categorical:
  user: {dim: 64, hash: 2000000}
  shown: {table: item}
  hour: {dim: 4, bins: 24}
bag:
  recent: {table: item}
tasks:
  click: {kind: binary, label: click}
split: {by: row_index, modulo: 2, train: [0], valid: [1]}
"""


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """The command line in this process: the lines it prints, or the one that it exits with."""

    def run(*arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["jobs.plan", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            return str(stopped.code).splitlines()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def bounded(tmp_path: Path) -> list[str]:
    """A schema without data, all of whose tables are bounded."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bounded.yaml").write_text(yaml.safe_dump({"schema": yaml.safe_load(BOUNDED)}))
    return [f"--config-dir={tmp_path}", "data=bounded"]


def rows(lines: list[str]) -> dict[str, int]:
    tables = lines[1 : next(i for i, line in enumerate(lines) if line.startswith("rank"))]
    return {line.split()[0]: int(line.split()[1].replace(",", "")) for line in tables}


def test_a_datasets_encoders_say_how_large_its_tables_are(small_dataset: Path, plan: Callable) -> None:
    lines = plan(f"dataset={small_dataset}", "ranks=16", "hbm=80GB", "train.batch_size=4096")
    encoders = Dataset(small_dataset).encoders
    assert rows(lines) == {name: encoders.num_embeddings(name) for name in DIMS}
    city = pl.read_parquet(small_dataset / "train" / "*.parquet")["city"]
    assert rows(lines)["city"] > city.max()
    assert lines[-1].startswith("fits: peak rank ")
    assert "of 75.0 GB (80.0 GB less 5% reserve, " in lines[-1]
    assert "of dense parameters and 1.0 GB of activations and NCCL's buffers)" in lines[-1]


def test_without_a_dataset_the_schema_bounds_them_and_that_is_said(bounded: list[str], plan: Callable) -> None:
    lines = plan(*bounded, "ranks=8", "hbm=40GB", "train.sharding.default=[row_wise]")
    assert rows(lines) == {
        "user": 2_000_000 + 1,  # and the missing value
        "item": 100_000 + 1 + 3,
        "hour": 24 + 2,  # that many bins, and the largest value
    }
    assert lines[-2] == "without a dataset, rows are upper bounds: item, hour"
    weights = (2_000_001 * 64 + 100_004 * 32 + 26 * 4) * 4 / 8
    [least] = [line for line in lines if line.startswith("min")]
    assert float(least.split()[1]) == pytest.approx(weights / 1e6, rel=0.01)


def test_any_number_of_ranks_is_planned_and_more_ranks_than_lanes_are_a_note(
    bounded: list[str], plan: Callable
) -> None:
    lines = plan(*bounded, "ranks=3", "hbm=40GB")
    assert lines[-1].startswith("fits")
    assert "lanes" not in " ".join(lines)
    lines = plan(*bounded, "ranks=128", "hbm=40GB", "train.rank_batch_size=512")
    assert lines[-2] == "64 lanes: 2 ranks decode each row group; train.lanes=128: one rank"


def test_groups_that_average_large_tables_after_each_step_are_warned_of(bounded: list[str], plan: Callable) -> None:
    lines = plan(*bounded, "ranks=16", "hbm=40GB", "train.sharding_group=2")
    [line] = [
        line for line in lines if line.startswith("warning: train.sync_every=1 averages the tables of 8 replicas")
    ]
    assert "by all" in line


def test_a_vocabulary_without_a_bound_is_named(plan: Callable) -> None:
    [line] = plan("data=demo", "ranks=8", "hbm=40GB")
    assert line.startswith("error: table item, category, device")
    assert "dataset=" in line
    assert "max_size" in line
    assert "user_id" not in line


def test_the_command_line_of_a_training_can_be_used_without_its_run(small_dataset: Path, plan: Callable) -> None:
    train = [
        f"dataset={small_dataset}",
        "model=ple",
        "recipe=demo",
        "+train.sharding.user=[row_wise]",
    ]
    lines = plan(*train, "ranks=2", "device=cpu", "ddr=2GB", "train.batch_size=512")
    [user] = [line for line in lines if line.startswith("user")]
    assert "row_wise" in user
    less = r"\(2.0 GB less [\d.]+ MB of dense parameters and [\d.]+ MB of activations\)"
    assert re.fullmatch(rf"fits: peak rank \d uses [\d.]+ kB of 2.0 GB {less}", lines[-1])


@pytest.mark.parametrize("argument", ["run=runs/x", "resume=never"])
def test_a_run_which_a_plan_does_not_read_is_refused(small_dataset: Path, plan: Callable, argument: str) -> None:
    [line] = plan(f"dataset={small_dataset}", "ranks=2", "hbm=1GB", argument)
    assert line.startswith("error: configuration: jobs.plan reads no run: leave run= and resume= out")


def test_what_does_not_fit_is_one_line_with_what_helps(bounded: list[str], plan: Callable) -> None:
    [line] = plan(*bounded, "ranks=8", "hbm=1115MB", "train.sharding.default=[row_wise]")
    assert re.search(
        r"^error: the tables with their batches need [\d.]+ MB and 8 ranks have [\d.]+ MB of GPU memory", line
    )
    more = re.search(r"Try (\d+) ranks or more, train\.kernels\.default=\[fused_uvm_caching\]", line)
    assert plan(*bounded, f"ranks={more[1]}", "hbm=1115MB", "train.sharding.default=[row_wise]")[-1].startswith("fits")
    cached = ["train.kernels.default=[fused_uvm_caching]", "ddr=1GB"]
    assert (
        " of main memory" in plan(*bounded, "ranks=8", "hbm=1115MB", "train.sharding.default=[row_wise]", *cached)[-1]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ranks=2", "hbm=1GB"], "dataset=PATH"),
        (["data=demo", "ranks=2"], "hbm=80GB"),
        (["data=demo", "ranks=2", "device=cpu"], "ddr=16GB"),
        (["data=demo", "hbm=1GB"], "ranks"),
        (["data=demo", "ranks=12", "hbm=1GB"], "ranks=12 must be a multiple of ranks_per_node=8"),
        (["data=demo", "ranks=4096", "hbm=1GB"], "batch_size=2048 leaves some of the 4096 ranks without a row"),
        (["data=demo", "ranks=2", "hbm=1GB", "train.batch_size=9", "train.lanes=2"], "must be divisible by lanes=2"),
        (["data=demo", "ranks=2", "hbm=many"], "hbm"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_one_line(arguments: list[str], says: str, plan: Callable) -> None:
    [line] = plan(*arguments)
    assert line.startswith("error: ")
    assert says in line


# Step times


def step_times(lines: list[str]) -> dict[int, dict[str, str]]:
    """By number of ranks the other cells of the table, by their heads."""
    start = next(n for n, line in enumerate(lines) if line.split()[:2] == ["ranks", "nodes"])
    heads = re.split(r"\s{2,}", lines[start].strip())
    rows = [line.split() for line in lines[start + 1 :] if re.match(r"\s*\d+ +\d", line)]
    return {int(cells[0]): dict(zip(heads, cells, strict=True)) for cells in rows}


def test_step_times_add_up_and_rows_and_hours_follow_from_them(small_dataset: Path, plan: Callable) -> None:
    lines = plan(f"dataset={small_dataset}", "kind=h100", "train.batch_size=4096", "train.epochs=3", "ranks_per_node=4")
    found = step_times(lines)
    assert list(found) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    rows = Dataset(small_dataset).manifest.rows["train"]
    for ranks, cells in found.items():
        parts = [float(cells[name]) for name in ("compute", "tables", "exchange", "all-reduce")]
        step = float(cells["step ms"])
        assert step == pytest.approx(sum(parts), abs=0.03)
        assert int(cells["rows a rank"].replace(",", "")) * ranks == 4096
        rate = float(cells["rows/s"].replace(",", ""))
        assert rate == pytest.approx(4096 / step * 1000, rel=0.01)
        assert float(cells["hours"]) == pytest.approx(3 * rows / rate / 3600, abs=0.006)
        assert cells["fits"] == "yes"
        assert int(cells["nodes"]) == -(-ranks // 4)
    assert float(found[1]["exchange"]) == float(found[1]["all-reduce"]) == 0
    assert float(found[8]["exchange"]) > 2 * float(found[4]["exchange"])  # over the network
    assert any(line.startswith("guessed: 40% of the FLOP/s, 50% of the memory") for line in lines)


def test_rows_that_pad_a_batch_are_not_trained_on_and_max_steps_ends_a_run(
    small_dataset: Path, plan: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    monkeypatch.setattr(scaling, "REPORT_S", 0)
    monkeypatch.setattr(scaling.logger, "info", reported.append)
    words = ["kind=cpu-core", "ddr=4GB", "link=1mbit", "train.batch_size=64", "train.max_steps=36000", "scale=[1,48]"]
    lines = plan(f"dataset={small_dataset}", *words, "train.epochs=1000000")
    cells = step_times(lines)[48]
    assert cells["rows a rank"] == "2"
    seconds = float(cells["step ms"].replace(",", "")) / 1000
    assert float(cells["rows/s"].replace(",", "")) == pytest.approx(64 / seconds, rel=0.02)
    assert float(cells["hours"]) == pytest.approx(10 * seconds, rel=0.01)
    assert any(line.startswith("guessed: CPU core") for line in lines)
    assert any("dense gradients of 3 ranks and more do not travel during the backward" in line for line in lines)
    assert reported[-1] == "planned 1 of 2 numbers of ranks; next: 48 ranks"


def test_step_times_are_for_ranks_that_the_tables_do_not_fit_on_too(bounded: list[str], plan: Callable) -> None:
    lines = plan(*bounded, "kind=l4", "hbm=1420MB", "link=10gbit", "scale=[1,2,3,4]", "train.rank_batch_size=512")
    found = step_times(lines)
    assert {ranks: cells["fits"] for ranks, cells in found.items()} == {1: "no", 2: "yes", 3: "yes", 4: "yes"}
    assert {cells["rows a rank"] for cells in found.values()} == {"512"}
    assert "guessed: lists of half their max_length (recent)" in lines
    lines = plan(*bounded, "kind=l4", "scale=[1,3,12]", "ranks=8", "hbm=40GB")
    assert "12 ranks left out: no multiple of ranks_per_node=8" in lines
    assert step_times(lines).keys() == {1, 3}
    assert any(line.startswith("fits: peak rank") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kind=abacus"], "kind=abacus: no figures of it; choose from h100, h200"),
        (["kind=h100", "link=fast"], "link=fast: expected the rate of a node's network, such as 100mbit"),
        ([], "ranks is missing: set the size of the cluster, or kind="),
    ],
)
def test_step_times_of_what_has_no_figures_are_refused_in_one_line(
    arguments: list[str], message: str, bounded: list[str], plan: Callable
) -> None:
    [line] = plan(*bounded, *arguments)
    assert message in line
