"""jobs.predict as a library: a log without labels, scored, against the evaluator's predictions of the same rows with labels."""

import hashlib
import json
import pickle
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from ingest_runs import content_of, no_beam, run
from test_hosts import started

from features.errors import UserError
from features.schema.schema import Schema
from features.schema.unlabelled import for_scoring, without_labels
from jobs import predict as predict_job
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation import predictions
from pipeline.evaluation.scorer import Scorer
from pipeline.ingest import workers
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.runners import handshake
from pipeline.release.predict import predict as module
from pipeline.release.predict.config import PredictConfig
from pipeline.release.predict.manifest import Predictions
from pipeline.release.predict.score import Scoring, put
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage import objects
from pipeline.storage.store_path import StorePath, copy_all, files_below
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]
DAY, PAST, ASKED = 86_400, 160, 90
BATCH, FILE = 16, 32  # rows
BEGIN = 1_782_000_000
LATER = ("qty", "part")  # columns of labels, the weight or a split, which rows to be scored lack
CONTENT: dict[str, Any] = {
    "source": {
        "files": "impressions-*.jsonl", "format": "jsonl", "key": "id", "types": {"qty": "int"},
        "outcomes": {"click": {
            "files": "clicks.csv", "key": "id", "time": "then", "window": "30d", "open_window": "keep",
            "columns": {"dwell": "float"}, "read": {"format": "csv"},
        }},
        "tables": {"facts": {"files": "facts.csv", "key": "item", "columns": {"brand": "string", "cost": "float"},
                             "read": {"format": "csv"}}},
        "derived": {"initial": 'SUBSTR("user", 1, 2)', "rest": "price - 1"},
        "counters": {
            "ctr": {"by": "item", "of": "click", "take": "mean", "smoothing": 4},
            "spent": {"by": "user", "of": "price", "take": "sum"},
        },
    },
    "tables": {"item": {"dim": 4}},
    "dense": {
        "price": {"transform": "log1p", "piecewise": 4}, "age": {"missing_flag": True}, "ctr": {}, "spent": {"piecewise": 3},
        "rest": {}, "facts_cost": {"standardize": False},
    },
    "categorical": {
        "user": {"dim": 4, "hash": 50}, "city": {"dim": 4}, "item": {"table": "item"},
        "price_bin": {"column": "price", "dim": 4, "bins": 5}, "session": {"dim": 4, "managed": {"rows": 20}},
        "initial": {"dim": 4}, "facts_brand": {"dim": 4},
    },
    "bag": {
        "recent": {"table": "item", "max_length": 3}, "words": {"dim": 4, "separator": " ", "pooling": "sequence"},
        "seen": {"table": "item", "history": {"user": "user", "item": "item"}},
        "clicked": {"table": "item", "history": {"user": "user", "item": "item", "when": "click"}},
    },
    "vector": {"image": {"length": 3}},
    "tasks": {
        "click": {"kind": "binary", "label": "click"},
        "many": {"kind": "binary", "label": "qty > 1"},
        "dwell": {"kind": "regression", "label": "click_dwell", "observed_when": "click", "transform": "log1p"},
    },
    "weight": "1 + qty",
    "event_time": "at",
    "split": {"by": "row_index", "modulo": 1, "train": [0]},
    "keep": ["id", "city", "at"],
}  # fmt: skip


def rows_of_log(first: int, count: int, begin: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(first)
    return [
        {
            "id": f"r{n}", "at": begin + int(rng.integers(DAY)), "user": f"u{rng.integers(12)}", "item": f"i{rng.integers(9)}",
            "price": float(rng.gamma(2.0)), "age": None if n % 5 == 0 else int(rng.integers(20, 60)),
            "city": ["Paris, France", "Köln", None, f"of {first}"][n % 4], "session": f"s{rng.integers(30)}",
            "recent": [f"i{k}" for k in rng.integers(12, size=n % 4)],
            "words": " ".join(f"w{k}" for k in rng.integers(9, size=n % 5)),
            "image": None if n % 9 == 0 else rng.normal(size=3).tolist(), "qty": int(rng.integers(4)), "part": f"p{n}",
        }
        for n in range(first, first + count)
    ]  # fmt: skip


def write_log(folder: Path, rows: list[dict[str, Any]], clicked_at: int | None, without: tuple[str, ...] = ()) -> Path:
    """Two files of impressions and the side table; with `clicked_at` the clicks, all of them then."""
    folder.mkdir()
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        lines = [json.dumps({name: value for name, value in row.items() if name not in without}) for row in part]
        (folder / f"impressions-{number}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "facts.csv").write_text("item,brand,cost\n" + "".join(f"i{k},b{k % 3},{k / 4}\n" for k in range(8)))
    if clicked_at is not None:
        clicks = [f"{row['id']},{clicked_at},{n % 7}\n" for n, row in enumerate(rows) if n % 3 == 0]
        (folder / "clicks.csv").write_text("".join(["id,then,dwell\n", *clicks]))
    return folder


class World:
    """A run on a day's rows, the next day's rows without what only labels read, and the evaluator's predictions of these."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, rows_of_log(PAST, ASKED, BEGIN + DAY)
        run(write_log(folder / "past", rows_of_log(0, PAST, BEGIN), BEGIN + DAY - 1), folder / "data", CONTENT)
        model = ModelConfig(fusion={"name": "mmoe", "num_experts": 2, "levels": [[4]]}, tower=[4])
        settings = Settings(batch_size=32, lanes=4, epochs=1, threads=1)
        train(TrainConfig(dataset=folder / "data", run=folder / "run", model=model, train=settings))
        self.asked = write_log(folder / "asked", self.rows, None, LATER)
        labelled = write_log(
            folder / "labelled", self.rows, BEGIN + 2 * DAY
        )  # later than all rows, so in no counter of theirs
        # Kernels round the last digit by a row's place in its batch: here rows have the same places as where they are scored.
        run(labelled, folder / "next", CONTENT, encoders={"from": folder / "data"}, min_joined=0, order="input")
        record = Scorer(Run(folder / "run"), Dataset(folder / "next"), "all", BATCH).evaluate(
            self.step, write_predictions=True
        )
        self.evaluated = pl.read_parquet(predictions.path(Run(folder / "run"), "all", record["step"]))

    @property
    def step(self) -> int:
        return int(max((self.folder / "run" / "checkpoints").iterdir()).name.removeprefix("step-"))

    def predict(self, out: Path, **changes: Any) -> Predictions:
        settings = {
            "run": self.folder / "run",
            "input": str(self.asked),
            "out": out,
            "batch_size": BATCH,
            "rows_per_file": FILE,
        }
        return module.predict(PredictConfig(**settings | {"threads": 1} | changes))[0]


def score_in_a_loop(config: PredictConfig, scoring: Scoring, encoded: Any) -> None:
    """As the Beam step; each worker's copy of the work is made as Beam makes it."""
    do = pickle.loads(pickle.dumps(partial(module.run_score, scoring)))
    reports = [(number, do("score", number, shard)) for number, shard in enumerate(encoded.shards)]
    assert list(module.collect(scoring.folder, reports[::-1])) == []
    module.check(scoring.folder)


@pytest.fixture
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_scoring", score_in_a_loop)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with no_beam():
        yield World(tmp_path_factory.mktemp("predict"))


@pytest.mark.parametrize(("tables", "unit_bytes"), [("all", 1 << 20), ("needed", 5000)])
def test_predictions_are_the_evaluators_of_the_same_rows_in_the_order_of_the_log(
    tables: str, unit_bytes: int, world: World, no_runner: None, tmp_path: Path
) -> None:
    made = world.predict(
        tmp_path / "out", tables=tables, unit_bytes=unit_bytes, columns=["city", "initial", "price", "at"]
    )
    found = pl.read_parquet(tmp_path / "out" / "*.parquet")
    columns = ["id", "city", "initial", "price", "at", "row_id", "prob.click", "prob.many", "prediction.dwell"]
    assert found.columns == made.columns == columns
    assert found["id"].to_list() == [row["id"] for row in world.rows]
    assert found["price"].to_list() == [row["price"] for row in world.rows]
    assert found["initial"].to_list() == [row["user"][:2] for row in world.rows]
    wanted = pl.DataFrame({"id": found["id"]}).join(world.evaluated, on="id", maintain_order="left", validate="1:1")
    assert wanted.height == ASKED
    for name in ("city", "at", "prob.click", "prob.many", "prediction.dwell"):
        assert found[name].dtype == wanted[name].dtype
        assert found[name].equals(wanted[name], null_equal=True), name
    assert found["prob.click"].n_unique() > ASKED // 2  # not one for all


def test_evaluation_files_have_probabilities_in_float64_within_rounding_and_the_kept_values(world: World) -> None:
    rows = world.evaluated
    assert rows.columns[:4] == ["row_id", "id", "city", "at"]
    for task in ("click", "many"):
        p_N = 1 / (1 + np.exp(-rows[f"logit.{task}"].to_numpy().astype(np.float64)))
        np.testing.assert_allclose(rows[f"prob.{task}"].to_numpy(), p_N, rtol=1e-6)
    assert rows["prediction.dwell"].equals(rows["logit.dwell"])
    known = {row["id"]: row for row in world.rows}
    for row in rows.iter_rows(named=True):
        assert (row["city"], row["at"]) == (known[row["id"]]["city"], known[row["id"]]["at"])
        if row["label.many"] is not None:
            assert row["label.many"] == (known[row["id"]]["qty"] > 1)


def test_the_manifest_and_each_file_say_which_model_and_where_rows_went(
    world: World, no_runner: None, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    rows = [dict(row) for row in world.rows]
    rows[7]["price"], rows[50]["at"] = "dear", None
    write_log(asked, rows, None, LATER)
    made = world.predict(tmp_path / "out", input=str(asked), max_bad_fraction=0.1)
    assert (made.read["impressions"], made.rows, sum(made.dead_letters.values())) == (ASKED, ASKED - 2, 2)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert files == [f"part-{n:05d}-of-00003.parquet" for n in range(3)]
    assert made == Predictions.model_validate_json((tmp_path / "out" / "manifest.json").read_text())
    for file in (*made.files, *made.dead_letter_files):
        content = (tmp_path / "out" / file.path).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert [file.rows for file in made.files] == [32, 32, 24]
    scored = pl.read_parquet(tmp_path / "out" / "part-*.parquet")["id"].to_list()
    assert scored == [row["id"] for n, row in enumerate(rows) if n not in (7, 50)]
    metadata = pq.read_metadata(tmp_path / "out" / files[1]).metadata
    found = {key.decode(): value.decode() for key, value in metadata.items()}
    data, run = Dataset(world.folder / "data"), Run(world.folder / "run")
    wanted = {
        "run": str(run.path), "step": str(world.step), "fingerprint": data.manifest.fingerprint, "encoders": data.encoders_id,
        "checkpoint": checkpoint.read(checkpoint.folder(run.checkpoints, world.step)).checksum,
    }  # fmt: skip
    assert found.items() >= wanted.items()
    with pytest.raises(UserError, match=r"2 of 90 rows of impressions are bad.*max_bad_fraction=0.001"):
        world.predict(tmp_path / "other", input=str(asked))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked", "out"]


def test_at_no_moment_is_a_part_of_it_there_and_the_next_run_removes_what_a_killed_one_left(
    world: World, no_runner: None, tmp_path: Path
) -> None:
    out, there = tmp_path / "out", []

    def on_event(name: str, _: tuple) -> None:
        if watching and name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "ctypes.dlsym"):
            there.append(sorted(path.name for path in out.iterdir()) if watching[0] and out.exists() else None)

    left = tmp_path / f"out.staging-{'0' * 32}"
    (left / "scratch").mkdir(parents=True)
    (left / "part-00000-of-00001.parquet").write_bytes(b"of a killed job")
    watching = [True]
    sys.addaudithook(on_event)
    world.predict(out)
    watching.clear()
    whole = sorted(path.name for path in out.iterdir())
    begun = there.index(whole)
    assert begun > 50
    assert there == [None] * begun + [whole] * (len(there) - begun)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match=r"out exists\. Choose another out="):
        world.predict(out)


def test_what_cannot_be_scored_is_refused_in_one_line_and_leaves_nothing(
    world: World, no_runner: None, tmp_path: Path
) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            world.predict(tmp_path / "out", **changes)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    assert "no checkpoint (step 999); there are [" in refused(step=999)
    assert "no row of impressions has a value under the key cty" in refused(columns=["cty"])
    assert refused(columns=["qty"]).startswith("columns: qty is of outcomes, labels or the weight alone")
    assert "no such file" in refused(input=str(world.folder / "run"))
    assert "jobs.train run=" in refused(run=world.folder / "data")


def test_settings_of_the_reading_are_those_of_preprocess() -> None:
    shared = PreprocessConfig.model_fields.keys() & PredictConfig.model_fields.keys() - {"out"}
    assert shared >= {"date", "state", "missing_days", "runner", "workers", "options", "max_bad_fraction", "min_joined"}
    changed = {
        "input": "i", "date": "2026-11-21", "state": {"from": "s"}, "missing_days": "skip", "runner": "flink", "workers": 3,
        "options": ["--o"], "unit_bytes": 11, "bucket_bytes": 12, "broadcast_bytes": 13, "max_unpack_ratio": 14,
        "max_bad_fraction": 0.5, "min_joined": 0.25, "master": "spark://h:1", "hosts": ["h:1"], "scratch": Path("/s"),
    }  # fmt: skip
    assert changed.keys() == shared
    found = PredictConfig(run="r", out="o", **changed).encoding(Path("f"), Path("e"))
    wanted = PreprocessConfig(
        out="f", labels="none", order="input", encoders={"from": "e"}, rows_per_shard=1 << 18, **changed
    )
    assert found == wanted
    for name in shared - {"input"}:
        assert PreprocessConfig.model_fields[name].get_default() == PredictConfig.model_fields[name].get_default()


@pytest.mark.parametrize("split", [
    {"by": "hash", "key": "part", "valid": 0.2, "test": 0.2},
    {"by": "time", "valid_from": "2026-06-21", "test_from": "2026-06-22"},
])  # fmt: skip
def test_all_rows_to_be_scored_are_in_one_split_and_keep_the_key_and_the_columns(split: dict[str, Any]) -> None:
    schema = Schema.parse(CONTENT | {"split": split}, "mine.yaml")
    found = for_scoring(schema, ["user", "id"], "columns")
    assert found.keep == ["id", "user"]
    assert found.inputs_fingerprint == schema.inputs_fingerprint
    assert found.used_splits == {"test"}
    assert not {*LATER} & {*without_labels(found).raw_columns}


def test_a_kept_column_with_the_name_of_another_has_its_own_in_the_dataset() -> None:
    schema = Schema.parse(CONTENT | {"keep": ["id", "city"]}, "mine.yaml")
    assert predictions.kept_names(schema, ["row_id", "city"]) == {"raw.id": "id", "raw.city": "raw.city"}


def test_the_command_scores_on_beam_and_prints_where_rows_went_and_what_comes_next(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    settings = [
        f"run={world.folder}/run",
        f"input={world.asked}",
        f"out={tmp_path}/out",
        f"batch_size={BATCH}",
        "threads=1",
    ]
    monkeypatch.setattr(sys, "argv", ["jobs.predict", *settings, "columns=[city]", f"rows_per_file={FILE}"])
    predict_job.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"impressions: {ASKED} rows read, {ASKED} scored, 0 bad"
    assert f"{tmp_path}/out: {ASKED} rows in 3 files" in printed[-2]
    assert shlex.split(printed[-1])[:3] == ["next", "python", "-c"]
    exec(shlex.split(printed[-1])[3])
    assert "prob.click" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_scoring", score_in_a_loop)
        world.predict(tmp_path / "alone", columns=["city"])
    assert content_of(tmp_path / "out") == content_of(tmp_path / "alone")


@pytest.mark.system
def test_a_worker_that_is_killed_ends_the_job_in_one_line_and_nothing_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", script])
    with pytest.raises(UserError, match=r"^a worker process ended in step score \(signal 9\)\. Nothing was written"):
        world.predict(tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("places", ["store", "store disk", "disk store"])
def test_on_a_store_are_the_same_files_and_dead_letters_wherever_they_are_made(
    places: str, world: World, no_runner: None, memory: Path, tmp_path: Path
) -> None:
    """Where `out` is, and then `scratch`."""
    at = {"store": memory, "disk": tmp_path}
    out, *scratch = places.split()
    asked = tmp_path / "asked"
    write_log(asked, [row | {"price": "dear"} if row["id"] == "r167" else row for row in world.rows], None, LATER)
    settings = {"input": str(asked), "max_bad_fraction": 0.1}
    made = world.predict(at[out] / "out", **settings, **({"scratch": at[scratch[0]] / "between"} if scratch else {}))
    alone = world.predict(tmp_path / "alone", **settings)
    assert made == alone
    found = {name: (at[out] / "out" / name).read_bytes() for name in content_of(tmp_path / "alone")}
    assert found == content_of(tmp_path / "alone")
    assert {path.parts[len(memory.parts)] for path in files_below(memory)} <= {"out"}
    assert {path.name for path in tmp_path.iterdir()} - {"out"} <= {"asked", "alone", "between"}
    assert content_of(tmp_path / "between") == {}


def test_a_commit_to_a_store_that_failed_is_ended_by_the_next_job(
    world: World, no_runner: None, memory: StorePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops_after_one(pairs: list[Any], before_each: Any) -> None:
        if pairs[0][1].parent != memory / "out":
            return copy_all(pairs, before_each)
        copy_all(pairs[:1], before_each)
        raise OSError("the store stops")

    with monkeypatch.context() as patch:
        patch.setattr(objects, "copy_all", stops_after_one)
        with pytest.raises(UserError, match="/out is not written to its end: the store stops"):
            world.predict(memory / "out")
    with pytest.raises(UserError, match=r"/out exists\."):
        world.predict(memory / "out")
    world.predict(tmp_path / "alone")
    wanted = content_of(tmp_path / "alone")
    assert {name: (memory / "out" / name).read_bytes() for name in wanted} == wanted


def test_predictions_that_another_job_has_committed_meanwhile_stay(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = tmp_path / "out" / "manifest.json"

    def beside_another(*work: Any) -> None:
        score_in_a_loop(*work)
        theirs.parent.mkdir()
        theirs.write_text("theirs")

    monkeypatch.setattr(module, "run_scoring", beside_another)
    with pytest.raises(UserError, match=r"/out exists\."):
        world.predict(tmp_path / "out")
    assert theirs.read_text() == "theirs"


def test_of_two_attempts_at_a_file_on_a_store_the_first_ones_bytes_stay_and_are_what_both_report(memory: Path) -> None:
    scoring = Scoring(None, memory, None, memory, 3, memory, "all", 1, None)
    assert (
        put(scoring, 1, b"first") == put(scoring, 1, b"rounded otherwise") == ("part-00001-of-00003.parquet", b"first")
    )


@pytest.mark.system
def test_workers_on_other_hosts_score_as_a_loop_does(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(handshake.KEY_VARIABLE, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_scoring", score_in_a_loop)
        world.predict(tmp_path / "alone")
    with started({}) as (pool,):
        world.predict(tmp_path / "out", runner="hosts", hosts=[pool.address], scratch=tmp_path / "between")
        assert pool.log.count("started worker") == 1
    assert content_of(tmp_path / "out") == content_of(tmp_path / "alone")
