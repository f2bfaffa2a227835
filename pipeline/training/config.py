"""Settings of jobs.train."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from features.errors import UserError
from models.ranker import ModelConfig
from pipeline.dataset.days import Days, MissingDays
from pipeline.dataset.read_ahead import LocalFolder, Reading
from pipeline.run.retention import Keep
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.storage.store_path import Place, place
from pipeline.training.optim.settings import DenseOptimizer, TableOptimizer
from pipeline.training.optim.strict import Strict
from pipeline.training.optim.weighting import Weighting
from pipeline.training.optim.weighting.fixed import Fixed


def place_of(text: str, setting: str) -> Path:
    """The path or URL in a setting that is no path itself. Raises UserError, naming it."""
    try:
        return place(text)
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from None


class Communication(Strict):
    """Number format of what the all-to-alls of pooled embeddings carry, and of their gradients on the way back."""

    forward: Literal["fp32", "fp16", "bf16"] = "fp32"
    backward: Literal["fp32", "fp16", "bf16"] = "fp32"


Choice = Annotated[list[str], Field(min_length=1)]
Allowed = dict[str, Choice]


BATCH_SIZE = 2048
SHARE = 256  # rows of a batch from each lane, where lanes are not set
# Of lanes that are not set. A rank holds a row group of each lane that it reads; ranks that share a lane decode the same ones.
FEWEST_LANES, MOST_LANES = 8, 64
SHUFFLED = 8 * 16384  # rows of all lanes that are shuffled together


class Order(NamedTuple):
    """What the order of rows follows from, beside dataset and seed: see pipeline.dataset.loader."""

    batch_size: int
    lanes: int
    window: int

    def settings(self) -> dict[str, int]:
        """Each by the name of its setting."""
        return self._asdict()


class Settings(Strict):
    """How to train.

    Attributes:
        batch_size, lanes, window: the order of rows. None is what the run began with, in a run that is resumed, and at the
            start as `order` says.
        batch_size: rows of a global batch, over all ranks.
        rank_batch_size: rows of it for each rank that a run begins on, in place of batch_size. On other ranks the run goes on
            with the same global batches.
        lanes: places of the dataset that each batch draws from, a divisor of batch_size.
        window: rows of a lane that are shuffled together.
        epochs: passes over the train split; max_steps ends earlier.
        seed: of the start, the order of rows and dropout.
        precision: of the dense part's products. bf16 runs it under autocast, all but the towers' last layers; tf32 rounds their
            factors to 10 bits on GPUs from Ampere on, and does nothing elsewhere. Losses, updates and scoring are in fp32.
        deterministic: sums on a GPU in the same order every time, so that a run can be repeated bit for bit, as it can on a CPU
            without this. Slower: one block of threads adds up all gradients of a frequent id.
        clip_norm: limit of the dense gradients' norm.
        weighting: of the tasks' losses.
        accumulate: micro-batches of a rank's batch that go through the dense part one after the other, for less memory; the
            same gradients as in one, apart from random draws (pipeline.training.step).
        compile: a mode of torch.compile for the dense part and its losses; reduce-overhead replays CUDA graphs, which hold the
            memory of activations between steps. Random draws (dropout) are others than without.
        sharding: allowed placements, for "default" or one table by name: a table on one rank, or its rows or columns on
            several, or on those of one machine (table_row_wise), or a copy on each (data_parallel). None: table_wise and
            row_wise, and on several nodes with GPUs table_row_wise.
        kernels: allowed compute kernels likewise; fused_uvm_caching keeps a table in main memory and caches rows on the GPU.
            A data_parallel table has one of its own.
        communication: of the embeddings between ranks.
        sharding_group: ranks that share one replica of the tables (2D parallel, pipeline.training.parallel.replicas), a
            divisor of all; None: all of them.
        sync_every: steps between averages over the replicas; a checkpoint averages too.
        dense_parallel: of everything but the tables: a copy a rank, or shards of weights, gradients and optimiser.
        pipelined: TorchRec's pipelined loop (None: where there is a GPU, and weighting and accumulate allow it).
        checkpoint_every: steps; None: once an epoch. The last step always has one.
        checkpoint_at: shares of the run's steps at which there is one too.
        checkpoint_async: written in the background from a copy in memory; False: piece by piece while training waits, for hosts
            whose memory cannot hold a second copy of their tables.
        keep: which checkpoints are kept.
        nonfinite: on a loss or gradient that is not finite: stop, or roll back and skip the batch.
        corrupt: on a row group that cannot be read: stop, or skip its rows and count them.
        max_skipped: batches that may be skipped in a run before it stops all the same.
        max_corrupt: share of the rows that may be skipped so.
        timeout: seconds that ranks wait for each other in a step, or a launcher for a heartbeat.
        init_from: a run whose newest checkpoint's weights this one starts from; what it lacks, and
            what reads features that are others there, is initialised as usual.
        log_every: steps between lines of train.jsonl.
        threads: of each rank's CPU operators; None: the cores shared evenly by the ranks of a machine.
        decode_workers: processes of each rank that decode its lanes, of which it has as many at most as lanes; 0: a thread
            of the rank. None: 0 on a CPU; on a GPU one for each of the rank's cores but one, up to 8.
        read_ahead_bytes: of a dataset on a store, memory of each process that decodes for row groups fetched before they are
            needed.
        cache, cache_bytes: a folder of a local disk, one for all ranks of a host, where row groups of a store are kept, and how
            much it may take; None: fetched anew in each epoch.
    """

    batch_size: int | None = Field(None, ge=1)
    rank_batch_size: int | None = Field(None, ge=1)
    lanes: int | None = Field(None, ge=1)
    window: int | None = Field(None, ge=1)
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=1 << 32)
    tables: TableOptimizer = TableOptimizer()
    dense: DenseOptimizer = DenseOptimizer()
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    deterministic: bool = False
    clip_norm: float | None = Field(None, gt=0)
    weighting: Weighting = Fixed()
    accumulate: int = Field(1, ge=1)
    compile: Literal["default", "reduce-overhead"] | None = None
    sharding: dict[str, Choice | None] = Field({"default": None})
    kernels: Allowed = Field({"default": ["fused"]})
    communication: Communication = Communication()
    sharding_group: int | None = Field(None, ge=1)
    sync_every: int = Field(1, ge=1)
    dense_parallel: Literal["ddp", "fsdp"] = "ddp"
    pipelined: bool | None = None
    checkpoint_every: int | None = Field(None, ge=1)
    checkpoint_at: list[Annotated[float, Field(gt=0, le=1)]] = Field([])
    checkpoint_async: bool = True
    keep: Keep = Keep()
    nonfinite: Literal["stop", "skip"] = "stop"
    corrupt: Literal["stop", "skip"] = "stop"
    max_skipped: int = Field(10, ge=0)
    max_corrupt: float = Field(0.01, gt=0, le=1)
    timeout: float = Field(600, gt=0, le=86400)
    init_from: Place | None = None
    log_every: int = Field(50, ge=1)
    threads: int | None = Field(None, ge=1)
    decode_workers: int | None = Field(None, ge=0)
    read_ahead_bytes: int = Field(Reading.ahead_bytes, ge=1 << 20)
    cache: LocalFolder | None = None
    cache_bytes: int = Field(Reading.cache_bytes, ge=1 << 20)

    @model_validator(mode="after")
    def _go_together(self) -> "Settings":
        chosen = {
            "pipelined": self.pipelined and "pipelined=true",
            "accumulate": self.accumulate > 1 and f"accumulate={self.accumulate}",
            "dense_parallel": self.dense_parallel == "fsdp" and "dense_parallel=fsdp",
            "compile": self.compile and f"compile={self.compile}",
        }
        for setting, reason in self.weighting.refuses.items():
            if written := chosen[setting]:
                raise ValueError(f"{written} {reason.format(name=self.weighting.name)}: leave it out")
        if self.batch_size and self.rank_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} and rank_batch_size={self.rank_batch_size} exclude each other: set one to null"
            )
        if self.sharding_group and any("fused_uvm_caching" in allowed for allowed in self.kernels.values()):
            raise ValueError(
                "sharding_group averages the tables of its groups behind the cache of kernel fused_uvm_caching: use fused"
            )
        if self.pipelined and self.accumulate > 1:
            raise ValueError(
                f"pipelined=true traces the model's graph, which accumulate={self.accumulate} hides: leave it out"
            )
        if self.compile == "reduce-overhead" and (chosen["accumulate"] or chosen["dense_parallel"]):
            raise ValueError(
                "compile=reduce-overhead replays kernels on the same memory, which "
                f"{chosen['accumulate'] or chosen['dense_parallel']} uses anew: use compile=default"
            )
        return self

    def is_pipelined(self, device: str, managed: bool) -> bool:
        """Whether the loop is TorchRec's pipelined one. managed: whether any table is."""
        if self.pipelined is not None:
            return self.pipelined
        possible = self.accumulate == 1 and "pipelined" not in self.weighting.refuses and not managed
        return possible and device == "cuda"

    def order(self, ranks: int = 1) -> Order:
        """The order of rows of a run that begins on `ranks` ranks, which counts for rank_batch_size alone.

        Lanes are the divisor of the batch with the most factors of two, and of these the largest, that gives a share of SHARE
        rows or more; fewer rows where there would be less than FEWEST_LANES.
        """
        batch_size = self.batch_size or (ranks * self.rank_batch_size if self.rank_batch_size else BATCH_SIZE)
        most = min(max(batch_size // SHARE, FEWEST_LANES), MOST_LANES)
        divisors = [n for n in range(1, most + 1) if batch_size % n == 0]
        lanes = self.lanes or max(divisors, key=lambda n: (n & -n, n))
        return Order(batch_size, lanes, self.window or max(SHUFFLED // lanes, 1))


class TrainConfig(TrackingSettings, Strict):
    """A run: which dataset, which model, how, and where its results go.

    Attributes:
        days: of a dataset of days those to read, in order: FIRST..LAST, or a list of these and of days.
        missing_days: of `days`: skip leaves those without a dataset out.
        tasks: train these only (None: all of the dataset's).
        resume: auto resumes from the newest undamaged checkpoint; never refuses a run that has one.
    """

    dataset: Place
    days: Days = None
    missing_days: MissingDays = "refuse"
    run: Place
    tasks: list[str] | None = None
    model: ModelConfig
    train: Settings
    resume: Literal["auto", "never"] = "auto"

    def shape(self) -> dict[str, Any]:
        """What the state in a checkpoint depends on: a run can only go on with the same."""
        return {
            "model": self.model.model_dump(),
            "tables": self.train.tables.name,
            "dense": self.train.dense.name,
            "weighting": self.train.weighting.model_dump(),
        } | ({} if (tables := self.train.tables.precision) == "fp32" else {"table_precision": tables})
