"""How far a run has come: all that decides how it continues, beside the learner's tensors."""

from dataclasses import dataclass, field

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader, Position
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.run import config_hash
from pipeline.training.config import TrainConfig
from pipeline.training.logging.progressive import ProgressiveMetrics


@dataclass
class TrainState:
    """The state of a run on one rank; every rank has the same step, position and skipped steps.

    Attributes:
        position: of the next batch in the data.
        progress: this rank's sums of progressive validation, and its rows.
        step: batches consumed, those of skipped steps included.
        skipped: steps whose batch is left out, since its loss or gradient is not finite; they may lie ahead.
        saved: step of the newest checkpoint, -1 before the first. It is in no checkpoint.
    """

    position: Position
    progress: ProgressiveMetrics
    step: int = 0
    skipped: set[int] = field(default_factory=set)
    saved: int = -1

    @property
    def updates(self) -> int:
        """Steps that have changed the weights."""
        return self.step - sum(step <= self.step for step in self.skipped)

    def rows_consumed(self, loader: Loader) -> int:
        """Rows before the position, whether they were trained on or left out."""
        return self.position.epoch * loader.rows + sum(self.position.cursors)

    def take(self, manifest: CheckpointManifest) -> None:
        """Takes step, position and skipped steps from a checkpoint's manifest."""
        self.step = self.saved = manifest.step
        self.position, self.skipped = Position(manifest.epoch, manifest.cursors), set(manifest.skipped)

    def manifest(
        self, config: TrainConfig, dataset: Dataset, loader: Loader, ranks: int, rows: int
    ) -> CheckpointManifest:
        """The manifest of a checkpoint of this state.

        Args:
            rows: that all ranks have trained on.
        """
        return CheckpointManifest(
            step=self.step,
            rows=rows,
            left_out=self.rows_consumed(loader) - rows,
            skipped=sorted(self.skipped),
            epoch=self.position.epoch,
            cursors=self.position.cursors,
            ranks=ranks,
            seed=loader.seed,
            window=loader.window,
            batch_size=loader.batch_size,
            data=config_hash([shard.sha256 for shard in loader.shards]),  # whatever the folder is called
            fingerprint=dataset.schema.fingerprint,
            encoders=dataset.encoders_id,
            config=config_hash(config.shape()),
        )
