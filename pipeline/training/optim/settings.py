"""Settings of optimisers, a part of those of jobs.train; those of task weightings are in weighting/."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from models.table_storage import Precision
from pipeline.training.optim.strict import Strict
from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS


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
        precision: of the weights; fp16 takes half the memory. Embeddings, gradients and the optimiser's state stay in fp32.
        rounding: of an update to fp16. stochastic is right on average; it follows from the seed and the step, so a resumed run
            rounds alike, and from the place of a row, so on another plan the weights differ by rounding. nearest, the only one
            of CPUs, loses updates below 1/4096 of a weight.
    """

    name: Annotated[str, AfterValidator(_registered)] = "rowwise_adagrad"
    lr: float = Field(0.05, gt=0)
    eps: float = Field(1e-8, gt=0)
    epochs: int | None = Field(None, ge=1)
    precision: Precision = "fp32"
    rounding: Literal["stochastic", "nearest"] = "stochastic"


class DenseOptimizer(Schedule):
    """Of everything but the tables."""

    name: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    lr: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
