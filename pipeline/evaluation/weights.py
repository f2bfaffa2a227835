"""A checkpoint's weights as a function from batches to logits, in the memory that there is.

In one process the model is whole, on the GPU where there is one. On several ranks the tables are sharded and loaded straight
from the checkpoint's files, whatever ranks have written these. With `tables: needed` each rank holds the rows that the split
looks up, and scores its batches by itself.
"""

# Shapes: B rows, T tasks, N needed rows of a table, D columns.

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError, one_line
from features.fit.encoders import Encoders
from features.schema.schema import Schema, Split
from models.emm import build_ranker
from models.managed import managed_tables
from models.ranker import ModelConfig, Ranker, table_weights
from models.table_storage import Precision, allocate_tables, store_tables
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.lockstep import batches_in_step, gathered, rank_of
from pipeline.evaluation.needed_rows import CompactIds, needed_rows, union
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.run import Run
from pipeline.torch_compat import table_kernels

Tables = Literal["all", "needed"]

logger = logging.getLogger(__name__)

# Shards the tables of a ranker, which are on the meta device, over all ranks; the rest it leaves where it is.
# Arguments: the ranker; `train` of the run's config.yaml, and where that is; the device; the tables' format; rows of a batch of
# all ranks. pipeline.training.parallel.scoring has the one, which this package may not import.
Shard = Callable[[Ranker, Mapping[str, Any], Path, torch.device, Precision, int], None]


@dataclass(frozen=True)
class Loading:
    """How the tables are loaded.

    Attributes:
        tables: all of them, or only the rows that the split needs.
        precision: of the tables: fp16 and bf16 take half the memory; the rest of the model stays fp32.
        shard: splits the work over the ranks of the process group, where there are several; None: a process is by itself.
    """

    tables: Tables = "all"
    precision: Precision = "fp32"
    shard: Shard | None = None

    @property
    def share(self) -> tuple[int, int]:
        """Which part of the rows is this process's, and of how many: its rank and the number of ranks that work together."""
        return rank_of() if self.shard else (0, 1)


class ModelWeights:
    """A run's model with the weights of one checkpoint after the other.

    Args:
        run: whose checkpoints. dataset: of the run's tasks. splits: whose rows will be scored.
        batch_size: rows of a batch, on each rank. loading: how the tables are loaded.
    Call Args:
        batch: on the CPU. Where tables are sharded all ranks call together (`in_step`).
    Returns: logit_BT on the CPU.
    Raises:
        UserError: settings that do not go together.
    """

    def __init__(
        self, run: Run, dataset: Dataset, splits: Sequence[Split], batch_size: int, loading: Loading | None = None
    ) -> None:
        self.run, self.dataset, self.splits, self.batch_size = run, dataset, splits, batch_size
        self.loading = loading or Loading()
        self.rank, self.ranks = self.loading.share
        self.model = ModelConfig.of_run(run.config(), run.path)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.sharded = self.ranks > 1 and self.loading.tables == "all"
        self.fits = False

    @cached_property
    @torch.inference_mode(False)  # whoever asks first: kernels of sharded tables are made of parameters with gradients
    def ranker(self) -> Ranker:
        """The model, on its device, without the weights of a checkpoint until one is loaded."""
        ranker = build_ranker(self.dataset.schema, self.dataset.encoders, self.model)
        rows = {table: len(row_N) for table, row_N in self.rows_of(ranker).items()}
        store_tables(ranker, self.loading.precision, rows)
        if self.sharded:
            assert self.loading.shard is not None
            where, trained = self.run.path / "config.yaml", self.run.config()["train"]
            self.loading.shard(
                ranker, trained, where, self.device, self.loading.precision, self.batch_size * self.ranks
            )
        else:
            try:
                allocate_tables(ranker, self.device)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{self.run.path}: its tables do not fit into the free memory of {self.device}. Shard them by jobs.launch "
                    "--nproc-per-node=N, or set tables=needed or table_precision=fp16; with CUDA_VISIBLE_DEVICES= in the "
                    "environment they lie in main memory."
                ) from None
        return ranker.to(self.device).eval()

    @cached_property
    def needed(self) -> dict[str, np.ndarray]:
        """Of each table of the schema the rows that are loaded, ascending; of none where all are."""
        if self.loading.tables == "all":
            return {}
        if self.rank == 0 and (managed := managed_tables(self.dataset.schema)):
            logger.info("tables=needed: all rows of managed tables are loaded: %s", ", ".join(managed))
        return union(gathered(lambda: needed_rows(self.dataset, self.splits, self.rank, self.ranks)))

    @cached_property
    def compact(self) -> CompactIds:
        """From ids to places among the rows that are loaded."""
        encoders = self.dataset.encoders
        rows = {table: encoders.num_embeddings(table) for table in self.needed}
        return CompactIds(self.dataset.schema, self.needed, rows, self.device)

    def check_fits(self, step: int) -> None:
        """Compares the model with the first checkpoint that is scored, before it takes any memory. Raises UserError."""
        if not self.fits:
            path = checkpoint.folder(self.run.checkpoints, step)
            check_fits(path, self.dataset.schema, self.dataset.encoders, self.model)
            self.fits = True

    def load(self, step: int) -> CheckpointManifest:
        """Takes the weights of a step's checkpoint, and returns its manifest. All ranks call it.

        Every file is read once for its checksum; ranks share that. The checkpoint is not deleted meanwhile.

        Raises:
            UserError: on every rank: a checkpoint that is not complete, of another model than config.yaml has, or trained on
                rows of other encoders.
        """
        path = checkpoint.folder(self.run.checkpoints, step)
        with ExitStack() as reading:

            def check() -> CheckpointManifest:
                self.check_fits(step)
                manifest = reading.enter_context(checkpoint.reading(path, self.rank, self.ranks))
                check_encoders(path, manifest, self.dataset)
                return manifest

            manifest = gathered(check)[0] if self.ranks > 1 else check()
            self._load(path)
        return manifest

    def in_step(self, batches: Iterator[Batch], empty: Callable[[], Batch]) -> Iterator[Batch]:
        """A rank's batches; where tables are sharded, then padding while other ranks still have some (`batches_in_step`)."""
        return batches_in_step(batches, empty) if self.sharded else batches

    def _load(self, path: Path) -> None:
        state: dict[str, Any] = dict(self.ranker.state_dict())
        needed = self.rows_of(self.ranker)
        names = {table: name for table, name in table_weights(self.ranker).items() if table in needed}
        partial = {f"model.{name}": (needed[table], state.pop(name)) for table, name in names.items()}
        checkpoint.load(path, {"model": state}, alone=not self.sharded)
        if partial:
            checkpoint.load_rows(path, partial)
        if self.sharded:
            for kernel in table_kernels(self.ranker):
                kernel.reset_cache_states()  # of rows of the checkpoint before

    def rows_of(self, ranker: Ranker) -> dict[str, np.ndarray]:
        """Of each table of a ranker that does not hold all its rows, those that it holds; EMM has several tables of one."""
        of_schema = {table.name: self.dataset.schema.table_of(table.feature_names[0]) for table in ranker.tables}
        return {name: self.needed[table] for name, table in of_schema.items() if table in self.needed}

    def model_input(self, batch: Batch) -> Batch:
        """A batch as the ranker takes it: on its device, with ids of the rows that are loaded."""
        if self.device.type != "cpu":  # pageable memory would be copied before the model goes on
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        # Of a copy: the batch's own ids are those of the encoders, by which slices are made.
        return Batch(**{**vars(batch), "sparse": self.compact(batch.sparse)}) if self.needed else batch

    def __call__(self, batch: Batch) -> Tensor:
        """The logits of a batch."""
        return in_main_memory(self._forward(batch))()

    def scored(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches and their logits: those of one are read once the next one is on its way, so that a GPU computes meanwhile."""
        before: tuple[Batch, Callable[[], Tensor]] | None = None
        for batch in batches:
            after = batch, in_main_memory(self._forward(batch))
            if before:
                yield before[0], before[1]()
            before = after
        if before:
            yield before[0], before[1]()

    @torch.no_grad()
    def _forward(self, batch: Batch) -> Tensor:
        """logit_BT on the model's device."""
        ranker, inputs = self.ranker, self.model_input(batch)
        if not self.sharded:
            return ranker(inputs)
        # FBGEMM's CPU kernels of sharded tables are autograd functions.
        with torch.inference_mode(False), torch.no_grad():
            return ranker(inputs)


def in_main_memory(x: Tensor) -> Callable[[], Tensor]:
    """Begins to copy a tensor there; what is returned waits for the copy, and for nothing that was begun after it."""
    if x.device.type == "cpu":
        return lambda: x
    copy = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait


def load_dense(run: Run, step: int, dataset: Dataset) -> Ranker:
    """A checkpoint's model without its tables, which stay on the meta device as do maps of ids; in eval mode, on the CPU.

    Args:
        dataset: of the run's tasks. The caller keeps the checkpoint from being deleted (checkpoint.reading).
    Raises:
        UserError: as ModelWeights.load.
    """
    path, model = checkpoint.folder(run.checkpoints, step), ModelConfig.of_run(run.config(), run.path)
    check_fits(path, dataset.schema, dataset.encoders, model)
    check_encoders(path, checkpoint.read(path), dataset)
    ranker = build_ranker(dataset.schema, dataset.encoders, model)
    state = {name: tensor for name, tensor in ranker.state_dict().items() if not tensor.is_meta}
    checkpoint.load(path, {"model": state}, alone=True)
    return ranker.eval()


def check_encoders(path: Path, manifest: CheckpointManifest, dataset: Dataset) -> None:
    """Raises UserError where a checkpoint was trained on rows of other encoders than a dataset's."""
    if manifest.encoders != dataset.encoders_id:
        raise UserError(
            f"{dataset.path} was encoded with {dataset.encoders_id}, {path} trained with {manifest.encoders}: its ids mean "
            "something else. Run jobs.preprocess with encoders.from=DATASET, the one it was trained on."
        )


def check_fits(path: Path, schema: Schema, encoders: Encoders, model: ModelConfig) -> None:
    """Compares the shapes of a model with those of a checkpoint, before any memory is allocated.

    A run's config.yaml may be untrusted: the checkpoint's files limit what the model may take.

    Raises:
        UserError: no model can be built of the settings, or one of another shape.
    """
    try:
        with torch.device("meta"):
            wanted = build_ranker(schema, encoders, model).state_dict()
    except UserError as error:
        raise UserError(f"{path.parents[1] / 'config.yaml'}: {error}") from None
    except (RuntimeError, TypeError, ValueError, LookupError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"{path.parents[1] / 'config.yaml'}: model cannot be built: {one_line(error)}") from None
    found = checkpoint.shapes(path)
    for name, tensor in wanted.items():
        if (shape := found.get(f"model.{name}")) != tuple(tensor.size()):
            has = "does not have it" if shape is None else f"has {list(shape)}"
            raise UserError(
                f"{path.parents[1] / 'config.yaml'}: its model has {name} of shape {list(tensor.size())}, the checkpoint "
                f"{path.name} {has}. They are not of one run: restore both."
            )
