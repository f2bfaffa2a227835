"""The architecture of a model=automtl: read once, when a run begins, and part of its configuration from then on."""

from pathlib import Path

from pydantic import ValidationError

from features.errors import UserError
from features.plain_json import first_fault
from features.yaml_text import read_yaml
from models.automtl.architecture import Architecture
from models.ranker import ModelConfig
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.training.config import TrainConfig, place_of

FILE = "architecture.yaml"


def resolved(config: TrainConfig) -> TrainConfig:
    """The same with the file of `model.architecture` in `model.fusion.architecture`, from which alone the model is built.

    A resumed run needs the file no more.

    Raises:
        UserError: it is missing, is no architecture, or the fusion has none.
    """
    model, run = config.model, Run(config.run)
    file = place_of(model.architecture, "model.architecture") if model.architecture else None
    if file and not file.exists() and checkpoint.steps(run.checkpoints):
        begun = ModelConfig.of_run(run.config(), run.path).fusion
        model = model.model_copy(update={"fusion": begun, "architecture": None})
    return config.model_copy(update={"model": with_architecture(model)})


def with_architecture(model: ModelConfig) -> ModelConfig:
    """See `resolved`."""
    if model.fusion.get("name") != "automtl":
        if model.architecture:
            raise UserError(f"model.architecture: fusion {model.fusion.get('name')} has none: set model=automtl")
        return model
    if model.architecture is None:
        if "architecture" in model.fusion:
            return model
        raise UserError(f"model.architecture is missing: {FILE} as jobs.search writes it, or the folder of its run")
    found = read(place_of(model.architecture, "model.architecture"))
    fusion = model.fusion | {"architecture": found.model_dump(exclude={"strengths"})}
    return model.model_copy(update={"fusion": fusion, "architecture": None})


def read(file: Path) -> Architecture:
    """The architecture in a file, or in that of a run's folder. Raises UserError where there is none."""
    file = file / FILE if file.is_dir() else file
    try:
        return Architecture.model_validate(read_yaml(file))
    except FileNotFoundError:
        raise UserError(
            f"model.architecture: {file} does not exist. jobs.search writes it when it has finished."
        ) from None
    except ValidationError as error:
        raise UserError(f"{file}: {first_fault(error)}. Mend it, or run jobs.search again.") from None
