"""Sources of an EMM: trained single-task models, found when a run begins, and their weights taken over."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from features.errors import UserError
from models.chains import CHAINS, ONE_EXPERT, PERCEPTRONS, chain_of
from models.emm import EMMSettings, FusedRanker, Source
from models.layers import PLAIN_EXPERTS
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.weights import check_fits
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.training.config import TrainConfig, place_of
from pipeline.training.restore import warm_start


def resolve(config: TrainConfig, dataset: Dataset, pinned: ExitStack) -> TrainConfig:
    """The same with `model.from` resolved into `model.fusion.sources`, from which alone the model can be built.

    A resumed run keeps the sources it began with, even where those runs have continued as well, or are gone. Every rank
    calls it; rank 0 lists folders, and the ranks share the reading.

    Args:
        pinned: until it is closed, the checkpoints that were found are not deleted.
    Raises:
        UserError: a run that is no chain of layers for one task of this dataset, or a task without one.
    """
    if config.model.fusion.get("name") != "emm":
        if config.model.from_:
            raise UserError(
                "model.from: only fusion emm is made of other runs. To start from one's weights: train.init_from"
            )
        return config
    if EMMSettings.of(config.model).sources:
        return config
    names = [str(place_of(name, "model.from").absolute()) for name in config.model.from_ or []]
    sources = warm_start.from_rank_0(lambda: _earlier(Run(config.run), names)) or _found(names, dataset, pinned)
    choice = {"from_": names, "fusion": config.model.fusion | {"sources": sources}}
    return config.model_copy(update={"model": config.model.model_copy(update=choice)})


def _earlier(run: Run, names: list[str]) -> list[dict[str, Any]] | None:
    """The sources of a run that has begun from the same ones."""
    if not checkpoint.steps(run.checkpoints):
        return None
    model = run.config()["model"]
    return model["fusion"]["sources"] if model.get("from") == names else None


def _found(names: list[str], dataset: Dataset, pinned: ExitStack) -> list[dict[str, Any]]:
    sources = [_source(name, dataset, pinned) for name in names]
    if missing := [task for task in dataset.schema.tasks if task not in {source.task for source in sources}]:
        raise UserError(
            f"model.from: no model of {', '.join(missing)} among {names}. Train one with tasks=[{missing[0]}], or leave the "
            "task out with tasks."
        )
    return [source.model_dump(mode="json", by_alias=True) for source in sources]


def _source(name: str, dataset: Dataset, pinned: ExitStack) -> Source:
    """What RUN or RUN@STEP was, if its kind is one that can be fused. Every rank calls it."""
    folder, _, number = name.rpartition("@")
    step = int(number) if folder and number.isdecimal() else None
    run = Run(place_of(name if step is None else folder, "model.from"))
    config, tasks = warm_start.from_rank_0(lambda: (run.config(), list(run.schema().tasks)))
    path = warm_start.newest(run, dataset, "model.from", pinned, step)
    return warm_start.from_rank_0(lambda: _checked(run, path, config, tasks, dataset))


def _checked(run: Run, path: Path, config: dict[str, Any], tasks: list[str], dataset: Dataset) -> Source:
    """The source that a run of one task is. Raises UserError for any other run."""
    model = ModelConfig.of_run(config, run.path)
    kind = model.fusion.get("name")
    wrong, no_chain = None, f"has fusion {kind}; a source is a plain chain of layers: {CHAINS}"
    if len(tasks) != 1:
        wrong = f"was trained for {', '.join(tasks)}; a source has one task, as with tasks=[{tasks[0]}]"
    elif tasks[0] not in dataset.schema.tasks:
        wrong = f"was trained for {tasks[0]}, which is none of this job's tasks: {', '.join(dataset.schema.tasks)}"
    elif kind not in {*PERCEPTRONS, *ONE_EXPERT}:
        wrong = no_chain
    elif layers := [f"{key}: {value}" for key, value in _other_layers(model).items()]:
        wrong = f"has experts {{{', '.join(layers)}}}; a source's layers are linear and ReLU, without norm"
    elif model.calibration != "none":
        wrong = f"has calibration {model.calibration}; a source has none, the fused model may"
    if wrong:
        raise UserError(f"model.from: {run.path} {wrong}.")
    check_fits(path, run.schema(), dataset.encoders, model)  # a fusion that has been built has arguments that fit
    if chain_of(model.fusion) is None:
        raise UserError(f"model.from: {run.path} {no_chain}.")
    return Source(run=str(run.path), step=checkpoint.read(path).step, task=tasks[0], model=model)


def _other_layers(model: ModelConfig) -> dict[str, Any]:
    """Settings of a chain's layers that its components in the fused model would not have. Dropout has no weights."""
    plain, given = PLAIN_EXPERTS.model_dump(exclude={"dropout"}), model.fusion.get("experts")
    given = given if isinstance(given, dict) else {}
    return {key: given[key] for key, value in plain.items() if given.get(key, value) != value}


def load(ranker: Ranker, state: dict[str, Tensor]) -> list[str]:
    """Fills what a fused model has of its sources, on any number of ranks, each of which reads its own part.

    Args:
        state: the model's, by name; filled in place.
    Returns: how each source was cut, in lines.
    Raises:
        UserError: a checkpoint that is gone or does not fit.
    """
    if not isinstance(ranker, FusedRanker):
        return []
    sources, fusion = ranker.settings.sources, ranker.fusion
    for source, names in zip(sources, ranker.source_names(), strict=False):
        path = checkpoint.folder(Run(place_of(source.run, "model.from")).checkpoints, source.step)
        checkpoint.load(path, {"model": {theirs: state[ours] for ours, theirs in names.items()}})
    lines = [f"fuses {len(sources)} models in {len(fusion.levels)} levels:"]
    for source, widths, remainder in zip(sources, fusion.widths, fusion.remainders, strict=True):
        parts = ["-".join(str(width) for width in part) for part in [*widths, remainder]]
        lines.append(f"  {source.name}, step {source.step}: {' | '.join(parts)}")
    return lines
