"""Runs over some of the tasks, runs that start from another's weights, and checkpoints at shares of a run."""

import warnings
from itertools import product
from pathlib import Path

import pytest
import small_architecture
import tiny_training
import torch
import yaml
from tiny_training import configuration, last, losses, make_dataset
from torch.testing import assert_close

from features.errors import UserError
from features.schema.schema import Schema
from models.ranker import ModelConfig, Ranker, is_table
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.follow import EvaluateConfig, evaluate
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.training.restore import warm_start
from pipeline.training.train import train

pytestmark = pytest.mark.integration

STILL = {"dense": {"lr": 1e-12}, "tables": {"lr": 1e-12}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return make_dataset(folder / "data")


def run(data: Path, path: Path, tasks: list[str] | None = None, **settings: object) -> Path:
    train(configuration(data, path, **settings).model_copy(update={"tasks": tasks}))
    return path


def test_a_run_of_one_task_trains_what_a_schema_with_that_task_alone_trains(data: Path, folder: Path) -> None:
    alone = make_dataset(folder / "alone", tasks={"click": tiny_training.SCHEMA["tasks"]["click"]})
    part = last(run(data, folder / "part", ["click"], max_steps=9))
    whole = last(run(alone, folder / "whole", max_steps=9))
    assert part.keys() == whole.keys()
    for name, value in part.items():
        assert torch.equal(value, whole[name]), name


def test_a_run_of_some_tasks_is_evaluated_on_them(data: Path, folder: Path) -> None:
    path = run(data, folder / "two", ["dwell", "click"], max_steps=3)
    (record,) = evaluate(EvaluateConfig(run=path, step="newest", threads=1))
    assert list(record["metrics"]) == ["click", "dwell"]  # in the schema's order
    assert Run(path).schema().fingerprint == Dataset(data).schema.fingerprint


def test_towers_of_their_own_layers_are_trained_scored_and_resumed(data: Path, folder: Path) -> None:
    layers = {"dwell": [6, 3], "click": [], "conversion": [5]}

    def trained(path: Path, steps: int) -> dict[str, torch.Tensor]:
        config = configuration(data, path, max_steps=steps)
        train(config.model_copy(update={"model": config.model.model_copy(update={"tower": layers})}))
        return last(path)

    whole = trained(folder / "own-towers", 6)
    shapes = [tuple(value.shape) for name, value in whole.items() if name.startswith("model.towers.tasks.1.hidden")]
    assert [shape[-1] for shape in shapes] == [5, 5]
    (record,) = evaluate(EvaluateConfig(run=folder / "own-towers", step="newest", threads=1))
    assert list(record["metrics"]) == ["click", "conversion", "dwell"]
    trained(folder / "own-resumed", 3)
    resumed = trained(folder / "own-resumed", 6)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_task_that_does_not_exist_is_named(data: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"clik.*click, conversion, dwell"):
        run(data, folder / "none", ["clik"])


def test_a_schema_without_some_tasks_keeps_nothing_of_them(data: Path) -> None:
    schema = Dataset(data).schema
    assert schema.expressions  # cached on the whole
    part = schema.only(["dwell"])
    assert list(part.tasks) == ["dwell"]
    assert not [key for key in part.expressions if "tasks.click" in key]
    assert part.fingerprint == schema.fingerprint
    assert part.columns == schema.columns


def test_a_run_starts_from_anothers_weights_and_not_from_its_optimisers(data: Path, folder: Path) -> None:
    first = run(data, folder / "first", max_steps=12)
    second = run(data, folder / "second", max_steps=1, init_from=first, **STILL)
    source, start = last(first), last(second)
    names = [name for name in source if name.startswith("model.")]
    assert names
    for name in names:
        assert_close(start[name], source[name], rtol=1e-5, atol=1e-8, msg=name)
    assert losses(second)[0] < losses(first)[0]
    steps = [value for name, value in start.items() if name.startswith("dense.") and name.endswith(".step")]
    assert {float(value) for value in steps} == {1.0}


def test_a_start_from_another_run_prints_no_warning_of_a_library(data: Path, folder: Path) -> None:
    first = run(data, folder / "heard", max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(data, folder / "unheard", max_steps=1, init_from=first)
    assert [str(warning.message) for warning in caught] == []


def test_weights_go_over_to_rows_of_other_labels_where_the_encoders_are_the_same(data: Path, folder: Path) -> None:
    soft = {"click": {"kind": "binary", "label": "0.1 + 0.8 * click"}}
    teacher = make_dataset(folder / "teacher", tasks=tiny_training.SCHEMA["tasks"] | soft)
    assert Dataset(teacher).schema.fingerprint != Dataset(data).schema.fingerprint
    first = run(teacher, folder / "taught", max_steps=12)
    second = run(data, folder / "better", max_steps=2, init_from=first)
    assert losses(second)[0] < losses(run(data, folder / "scratch", max_steps=2))[0]


def test_what_the_other_run_has_not_starts_afresh_and_is_named(
    data: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline")
    first = run(data, folder / "click only", ["click"], max_steps=2)
    caplog.clear()
    second = run(data, folder / "all", max_steps=1, init_from=first, tables={"lr": 1e-12})
    said = caplog.text
    assert "starts from" in said
    assert "fusion.gate.1.weight_SDH, towers.hidden" in said
    assert "embeddings" not in said
    assert_close(
        last(second)["model.embeddings.embedding_bags.user.weight"],
        last(first)["model.embeddings.embedding_bags.user.weight"],
    )


def test_a_run_of_other_encoders_or_without_a_checkpoint_is_refused(data: Path, folder: Path) -> None:
    fewer = make_dataset(folder / "fewer", rows=200)
    other = run(fewer, folder / "other", max_steps=2)
    with pytest.raises(UserError, match=r"train.init_from: .*its ids mean something else"):
        run(data, folder / "mixed", init_from=other)
    with pytest.raises(UserError, match=r"train.init_from: .*has no checkpoint"):
        run(data, folder / "mixed", init_from=folder / "nothing")


def test_a_run_on_a_grown_schema_starts_with_the_tables_that_are_unchanged(
    data: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline")
    first = run(data, folder / "before", max_steps=12)
    more = {"categorical": tiny_training.SCHEMA["categorical"] | {"also": {"column": "device", "dim": 4}}}
    changed = {"bag": tiny_training.SCHEMA["bag"] | {"topics": {"dim": 4, "max_length": 2}}}
    grown = make_dataset(folder / "grown", keep=data, **more, **changed)
    caplog.clear()
    second = run(grown, folder / "after", max_steps=1, init_from=first, **STILL)
    (line,) = [line for line in caplog.messages if "starts from" in line]
    assert "embedding_bags.also.weight" in line
    source, start = last(first), last(second)
    weight = "model.embeddings.embedding_bags.{}.weight"
    for table in ("user", "item", "device"):
        assert_close(start[weight.format(table)], source[weight.format(table)], rtol=1e-5, atol=1e-8, msg=table)
    assert source[weight.format("topics")].shape == start[weight.format("topics")].shape
    assert not torch.allclose(start[weight.format("topics")], source[weight.format("topics")])
    other = make_dataset(folder / "other grown", **more)
    with pytest.raises(UserError, match=r"train.init_from: .*its ids mean something else"):
        run(other, folder / "not grown from it", init_from=first)


D = tiny_training.SCHEMA["dense"]


@pytest.mark.parametrize(
    "dense",
    [
        {"price": D["price"], "age": D["age"]},  # another order
        {"age": D["age"], "importance": {}},  # another feature in the same place
        {"age": D["age"], "price": {}},  # another scale
    ],
    ids=["order", "feature", "scale"],
)
def test_layers_that_read_the_features_start_fresh_where_these_are_others(
    data: Path, folder: Path, dense: dict, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    caplog.set_level("INFO", "pipeline")
    source, name = folder / "of the first features", request.node.callspec.id
    if not source.exists():
        run(data, source, max_steps=12)
    other = make_dataset(folder / f"other {name}", keep=data, dense=dense)
    caplog.clear()
    path = run(other, folder / f"after other {name}", max_steps=1, init_from=source, **STILL)
    before, after = tiny_training.model(last(source)), tiny_training.model(last(path))
    shapes = {n: value.shape for n, value in before.items()}
    assert shapes == {n: value.shape for n, value in after.items()}  # which is all that was compared
    fresh = {n for n in shapes if not torch.allclose(before[n], after[n], rtol=1e-4, atol=1e-7)}
    # 35: two tables of 8, two of 8 and 4, one of 4, and the columns age, its flag, and price.
    assert fresh == {n for n, shape in shapes.items() if 35 in shape} != set()
    assert f"; started fresh: {', '.join(sorted(fresh))}" in caplog.text


MODELS = Path(__file__).parents[2] / "jobs" / "conf" / "model"
ON_ROWS = [
    "single_task",
    "shared_bottom",
    "cross_stitch",
    "mmoe",
    "ml_mmoe",
    "cgc",
    "ple",
    "adatt",
    "adatt_sp",
    "aitm",
    "home",
]


INTERACTIONS = [{"name": "concat"}, {"name": "dot"}, {"name": "cross", "layers": 2}]
CONCAT_ONLY = [(name, INTERACTIONS[0]) for name in ("pepnet", "stem")]


@pytest.mark.parametrize(("name", "interaction"), [*product(ON_ROWS, INTERACTIONS), *CONCAT_ONLY])
def test_all_layers_that_are_wider_where_a_table_is_are_known_to_read_the_features(
    data: Path, name: str, interaction: dict
) -> None:
    narrow, wide = (ranker_of(data, name, width, interaction) for width in (8, 12))
    shapes = {n: value.shape for n, value in narrow.state_dict().items() if not is_table(n)}
    wider = {n for n, value in wide.state_dict().items() if n in shapes and value.shape != shapes[n]}
    assert wider
    assert wider <= {n for n in shapes if narrow.reads_features(n, shapes[n])} < shapes.keys()


@pytest.mark.parametrize("chosen", small_architecture.INTERACTIONS)
def test_all_of_automtls_interaction_reads_the_features_and_nothing_behind_it(data: Path, chosen: str) -> None:
    ranker = ranker_of(data, "automtl", chosen=chosen)
    fusion = {n: v.shape for n, v in ranker.state_dict().items() if n.startswith("fusion.")}
    reads = {n for n, shape in fusion.items() if ranker.reads_features(n, shape)}
    assert reads == {n for n in fusion if n.startswith("fusion.interaction.")}


@pytest.mark.parametrize("name", ["apem", "autotask", "multitab"])
def test_all_of_a_network_that_attends_over_features_reads_them(data: Path, name: str) -> None:
    ranker = ranker_of(data, name)
    assert all(ranker.reads_features(n, value.shape) for n, value in ranker.state_dict().items() if not is_table(n))


def ranker_of(data: Path, name: str, width: int = 8, interaction: dict | None = None, chosen: str = "skip") -> Ranker:
    """A shipped model of the small schema, with a table of another width."""
    content = yaml.safe_load((MODELS / f"{name}.yaml").read_text()) | {"interaction": interaction or {"name": "concat"}}
    user = {"categorical": tiny_training.SCHEMA["categorical"] | {"user": {"dim": width}}}
    schema = Schema.parse(tiny_training.SCHEMA | user, "small.yaml")
    content = small_architecture.with_architecture(content, list(schema.tasks), chosen)
    return Ranker(schema, Dataset(data).encoders, ModelConfig.model_validate(content))


def test_a_damaged_newest_checkpoint_of_the_other_run_is_passed_over_and_logged(
    data: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline")
    first = run(data, folder / "half good", max_steps=12, checkpoint_every=6)
    good, damaged = (checkpoint.folder(first / "checkpoints", step) for step in (6, 12))
    file = damaged / "rank-00000.bin"
    file.write_bytes(file.read_bytes()[:-1])
    second = run(data, folder / "from half", max_steps=1, init_from=first, **STILL)
    said = caplog.text
    assert f"train.init_from: skipped a checkpoint: {file} has" in said
    assert f"starts from {good}" in said
    source, start = tiny_training.tensors(good), last(second)
    for name in (name for name in source if name.startswith("model.")):
        assert_close(start[name], source[name], rtol=1e-5, atol=1e-8, msg=name)
    (good / "tensors.json").unlink()
    with pytest.raises(UserError, match=r"train.init_from: every checkpoint of .*half good is damaged"):
        run(data, folder / "from none", max_steps=1, init_from=first)


def test_the_other_run_does_not_delete_what_is_started_from_before_it_is_read(
    data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(data, folder / "pruning", max_steps=2)
    path = checkpoint.folder(first / "checkpoints", 2)
    load, removed = warm_start.load, []

    def pruned(*arguments: object) -> list[str]:
        removed.append(checkpoint.remove(path))
        return load(*arguments)

    monkeypatch.setattr(warm_start, "load", pruned)
    run(data, folder / "in time", max_steps=1, init_from=first)
    assert removed == [False]
    assert checkpoint.remove(path)  # nobody holds it any more


def test_checkpoints_stand_at_the_shares_of_the_run_that_were_asked_for(data: Path, folder: Path) -> None:
    path = run(data, folder / "shares", max_steps=35, checkpoint_every=100, checkpoint_at=[1 / 7, 3 / 7])
    assert checkpoint.steps(path / "checkpoints") == [5, 15, 35]
