"""Settings of jobs.train."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.ranker import ModelConfig


class Strict(BaseModel):
    """Settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid")


class TableOptimizer(Strict):
    """Of the embedding tables, fused into their backward: one pass reads, updates and writes the rows of a batch."""

    name: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    lr: float = Field(0.02, gt=0)
    eps: float = Field(1e-8, gt=0)


class DenseOptimizer(Strict):
    """Of everything but the tables; lr rises linearly over `warmup_steps`, then decays to `final` of itself."""

    name: Literal["adam", "adamw", "adagrad"] = "adam"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["none", "linear", "cosine"] = "none"
    final: float = Field(0.0, ge=0, le=1)


class Settings(Strict):
    """How to train.

    Attributes:
        batch_size: rows of a global batch, over all ranks.
        lanes: a multiple of every rank count that may be used, a divisor of batch_size (see pipeline.loader).
        window: rows of a lane that are shuffled together.
        epochs: passes over the train split; max_steps ends earlier.
        seed: of the start, the order of rows and dropout.
        precision: bf16 runs the dense part under autocast.
        clip_norm: limit of the dense gradients' norm.
        sharding: allowed placements, for "default" or one table by name.
        pipelined: TorchRec's pipelined loop (None: where there is a GPU).
        checkpoint_every: steps; None: once an epoch. The last step always has one.
        log_every: steps between lines of train.jsonl.
        threads: of each rank's CPU operators; None: the cores shared evenly by the ranks of a machine.
    """

    batch_size: int = Field(4096, ge=1)
    lanes: int = Field(8, ge=1)
    window: int = Field(16384, ge=1)
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=1 << 32)
    tables: TableOptimizer = TableOptimizer()
    dense: DenseOptimizer = DenseOptimizer()
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: float | None = Field(None, gt=0)
    sharding: dict[str, Annotated[list[str], Field(min_length=1)]] = {"default": ["table_wise", "row_wise"]}
    pipelined: bool | None = None
    checkpoint_every: int | None = Field(None, ge=1)
    log_every: int = Field(50, ge=1)
    threads: int | None = Field(None, ge=1)


class TrainConfig(Strict):
    """A run: which dataset, which model, how, and where its results go.

    Attributes:
        resume: auto goes on from the newest checkpoint that is whole; never refuses a run that has one.
    """

    dataset: Path
    run: Path
    model: ModelConfig
    train: Settings
    resume: Literal["auto", "never"] = "auto"

    def shape(self) -> dict[str, Any]:
        """What the state in a checkpoint depends on: a run can only go on with the same."""
        return {"model": self.model.model_dump(), "tables": self.train.tables.name, "dense": self.train.dense.name}
