"""A run's config.yaml may be untrusted: its model takes no more memory than the checkpoint's files have bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from small_architecture import with_architecture
from tiny_training import configuration, make_dataset

from features.errors import UserError
from models.emm import build_ranker
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation import weights
from pipeline.evaluation.scorer import Scorer
from pipeline.run.run import Run
from pipeline.training.train import train

MODELS = sorted(path for path in (Path(__file__).parents[2] / "jobs/conf/model").glob("*.yaml") if path.stem != "emm")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    make_dataset(folder / "data")
    train(configuration(folder / "data", folder / "run", checkpoint_every=2, max_steps=2))
    return folder


@pytest.fixture
def scored(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Any]:
    """Scores a copy of the run whose model settings were changed, while no model may be built in main memory."""

    def score(changes: dict[str, Any]) -> Any:
        shutil.copytree(trained / "run", tmp_path / "run")
        content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        content["model"] |= changes
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(content))

        def meta_only(*given: Any) -> Any:
            if changes and torch.empty(0).device.type != "meta":
                raise AssertionError("a model is built in memory")
            return build_ranker(*given)

        monkeypatch.setattr(weights, "build_ranker", meta_only)
        return Scorer(Run(tmp_path / "run"), Dataset(trained / "data"), "valid", 64).evaluate(2)

    return score


@pytest.mark.integration
def test_a_run_as_it_was_trained_is_scored(scored: Callable[[dict[str, Any]], Any]) -> None:
    assert scored({})["step"] == 2


@pytest.mark.integration
@pytest.mark.parametrize(("changes", "says"), [
    ({"tower": [18_000, 18_000]}, "has towers.* of shape"),
    ({"tower": [60_000] * 60}, "has towers.* of shape"),
    ({"fusion": {"name": "mmoe", "num_experts": 10**7, "levels": [[16], [8]]}}, "has fusion.* of shape"),
    ({"fusion": {"name": "mmoe", "num_experts": 3, "levels": [[10**9], [10**9]]}}, "levels"),
    ({"fusion": {"name": "mmoe", "num_experts": 3, "levels": [[-16], [8]]}}, "cannot be built|levels"),
    ({"fusion": {"name": "mmoe", "num_experts": 3, "levels": "x"}}, "cannot be built|levels"),
    ({"fusion": {"name": "adatt", "levels": [[16], [8]]}}, "checkpoint step-00000002 does not have it|of shape"),
    ({"tower": [10**30]}, "model.tower.0"), ({"tower": [-5]}, "model.tower.0"),
    ({"embedding_std": float("nan")}, "embedding_std"),
])  # fmt: skip
def test_a_model_of_another_shape_than_the_checkpoints_is_refused_before_it_takes_memory(
    scored: Callable[[dict[str, Any]], Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as refused:
        scored(changes)
    assert "config.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_a_model_without_memory_has_the_shapes_of_the_one_with(trained: Path, file: Path) -> None:
    dataset = Dataset(trained / "data")
    content = with_architecture(yaml.safe_load(file.read_text()), list(dataset.schema.tasks))
    config = ModelConfig.model_validate(content)
    real = build_ranker(dataset.schema, dataset.encoders, config, device="cpu").state_dict()
    with torch.device("meta"):
        empty = build_ranker(dataset.schema, dataset.encoders, config).state_dict()
    assert {name: tensor.size() for name, tensor in empty.items()} == {name: t.size() for name, t in real.items()}
    assert all(tensor.is_meta for tensor in empty.values())


@pytest.mark.parametrize("settings", [
    {"tower": [0]}, {"tower": [1 << 17]}, {"tower": [1] * 100}, {"embedding_std": -1.0},
    {"embedding_std": float("inf")}, {"field_dim": 10**9}, {"numeric_dim": 10**9},
])  # fmt: skip
def test_sizes_that_no_model_has_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate({"fusion": {"name": "mmoe"}} | settings)
