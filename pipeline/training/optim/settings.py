"""Settings of optimisers and task weighting, a part of those of jobs.train."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS


class Strict(BaseModel):
    """Settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid")


def _registered(name: str) -> str:
    if name not in TABLE_OPTIMIZERS:
        raise ValueError(f"{name} is not one of {', '.join(TABLE_OPTIMIZERS)}")
    return name


class Schedule(Strict):
    """Of a learning rate: it rises linearly over `warmup_steps`, then decays to `final` of itself by the last step."""

    lr: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["none", "linear", "cosine"] = "none"
    final: float = Field(0.0, ge=0, le=1)


class TableOptimizer(Schedule):
    """Of the embedding tables, one of pipeline.training.optim.table_optimizers, fused into their backward.

    Attributes:
        epochs: after which the tables stay as they are (null: none). Rows of rare ids learn their few labels by heart when they
            are seen again, and the error on other rows jumps at the second epoch (Zhang et al., arXiv 2209.06053).
    """

    name: Annotated[str, AfterValidator(_registered)] = "rowwise_adagrad"
    lr: float = Field(0.02, gt=0)
    eps: float = Field(1e-8, gt=0)
    epochs: int | None = Field(None, ge=1)


class DenseOptimizer(Schedule):
    """Of everything but the tables."""

    name: Literal["adam", "adamw", "adagrad"] = "adam"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)


TaskWeights = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class Fixed(Strict):
    """The schema's loss weight for each task; `weights` stand in for some of them or all."""

    name: Literal["fixed"] = "fixed"
    weights: TaskWeights = {}


class Equal(Strict):
    """1 for each task, whatever the schema says."""

    name: Literal["equal"] = "equal"


class Uncertainty(Strict):
    """Learnt with the dense parameters (models.losses.UncertaintyLoss); the schema's loss weights do not count."""

    name: Literal["uncertainty"] = "uncertainty"


class GradNorm(Strict):
    """Learnt from the tasks' gradients (pipeline.training.optim.weighting); the schema's loss weights do not count.

    Attributes:
        alpha: how much a task that learns more slowly than the others gains; 0 only evens the gradients' norms out.
        lr: share by which a weight changes in a step, about.
    """

    name: Literal["gradnorm"] = "gradnorm"
    alpha: float = Field(1.5, ge=0, allow_inf_nan=False)
    lr: float = Field(0.025, gt=0, allow_inf_nan=False)


class PCGrad(Strict):
    """As fixed, less the parts of the tasks' gradients that conflict (pipeline.training.optim.weighting)."""

    name: Literal["pcgrad"] = "pcgrad"
    weights: TaskWeights = {}


Weighting = Annotated[Fixed | Equal | Uncertainty | GradNorm | PCGrad, Field(discriminator="name")]
