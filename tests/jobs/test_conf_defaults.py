"""The YAML of each job lists every setting of its pydantic class, with the class's own default where it has one."""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from omegaconf import OmegaConf
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from jobs.submit import Submit
from pipeline.evaluation.explain.explain import ExplainConfig
from pipeline.evaluation.follow import EvaluateConfig
from pipeline.evaluation.relabel import RelabelConfig
from pipeline.ingest.config import PreprocessConfig
from pipeline.release.config import NightlyConfig
from pipeline.release.export.config import ExportConfig
from pipeline.release.predict.config import PredictConfig
from pipeline.search.config import SearchConfig
from pipeline.serving.http.config import ServeConfig
from pipeline.synthetic.event_log import LogConfig
from pipeline.synthetic.ratings_log import RatingsConfig
from pipeline.training.config import TrainConfig
from pipeline.training.parallel.capacity import PlanConfig

CONF = Path(__file__).parents[2] / "jobs" / "conf"
JOBS: dict[str, type[BaseModel]] = {
    "evaluate": EvaluateConfig,
    "explain": ExplainConfig,
    "export": ExportConfig,
    "generate": LogConfig,
    "generate_ratings": RatingsConfig,
    "nightly": NightlyConfig,
    "plan": PlanConfig,
    "predict": PredictConfig,
    "preprocess": PreprocessConfig,
    "relabel": RelabelConfig,
    "search": SearchConfig,
    "serve": ServeConfig,
    "submit": Submit,
    "train": TrainConfig,
}
GROUPS = {
    "train.model",
    "plan.model",
    "search.model",
    "submit.cluster",
}  # from folders of conf, which override defaults on purpose
NOT_FIELDS = {"generate.out", "generate_ratings.out"}  # the job itself takes it
# Of the supernet's weights as in the paper: training has an optimiser of its own.
ON_PURPOSE = {"search.train.dense.name": "sgd", "search.train.dense.lr": 0.02, "search.train.dense.decay": "cosine"}
MISSING = object()


def settings_of(job: str) -> dict[str, Any]:
    """What the YAML says, with that of other jobs which it builds on."""
    content = yaml.safe_load((CONF / f"{job}.yaml").read_text())
    parents = [name for name in content.pop("defaults") if isinstance(name, str) and name not in ("_self_", "job")]
    merged = OmegaConf.merge(*(settings_of(parent) for parent in parents), content)
    return OmegaConf.to_container(merged)


def nested(annotation: Any) -> type[BaseModel] | None:
    """The one class of settings below a field; None for plain values, and for a choice of several classes."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        found = [c for part in get_args(annotation) if (c := nested(part))]
        return found[0] if len(found) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def fields_of(model: type[BaseModel], given: Any, path: str) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Each setting by its path in the YAML, with its field and the value given; of nested settings the innermost."""
    for name, field in model.model_fields.items():
        key = field.alias or name
        value = given.get(key, MISSING)
        if f"{path}.{key}" in GROUPS:
            continue
        if (inner := nested(field.annotation)) and value is not None:
            yield from fields_of(inner, {} if value is MISSING else value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", field, value


def paths_in(given: dict[str, Any], known: set[str], path: str) -> Iterator[str]:
    for key, value in given.items():
        whole = f"{path}.{key}"
        yield from paths_in(value, known, whole) if isinstance(value, dict) and whole not in known else [whole]


@pytest.mark.parametrize("job", JOBS)
def test_the_yaml_lists_exactly_the_settings_of_the_class(job: str) -> None:
    given = settings_of(job)
    known = {path for path, _, _ in fields_of(JOBS[job], given, job)}
    assert {path for path, _, value in fields_of(JOBS[job], given, job) if value is MISSING} == set()
    assert set(paths_in(given, known, job)) - NOT_FIELDS == known


@pytest.mark.parametrize("job", JOBS)
def test_a_default_in_the_yaml_is_that_of_the_class(job: str) -> None:
    differ = {}
    for path, field, value in fields_of(JOBS[job], settings_of(job), job):
        open_value = isinstance(value, str) and (value == "???" or "${" in value)
        if field.is_required() or value is MISSING or open_value:
            continue
        default = field.get_default(call_default_factory=True)
        if (read := TypeAdapter(field.annotation).validate_python(value)) != default:
            differ[path] = read
    assert differ == {path: value for path, value in ON_PURPOSE.items() if path.startswith(f"{job}.")}


@pytest.mark.parametrize("job", sorted(JOBS))
def test_what_a_user_must_give_has_no_default_in_the_class(job: str) -> None:
    for path, field, value in fields_of(JOBS[job], settings_of(job), job):
        assert (value == "???") <= field.is_required(), path


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_every_model_lists_the_settings_that_all_models_have(model: str) -> None:
    content = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())
    assert {"fusion", "tower", "dropout", "start", "embedding_std"} <= content.keys()
