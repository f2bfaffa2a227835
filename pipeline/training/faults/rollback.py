"""Rollback over batches that cannot be trained on: which steps are skipped, and from which checkpoint training repeats."""

from features.errors import UserError


class Rollbacks:
    """The rollbacks of a run.

    Args:
        max_skipped: batches that may be skipped before the run stops all the same.
    Attributes:
        tried: steps of checkpoints that the run was rolled back to.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped, self.tried = max_skipped, set[int]()

    def skip(self, bad_step: int, skipped: set[int]) -> set[int]:
        """The steps to skip from now on. Raises UserError beyond `max_skipped`."""
        if len(skipped) >= self.max_skipped and bad_step not in skipped:
            raise UserError(
                f"step {bad_step}: loss or gradient is not finite, and {len(skipped)} batches were skipped already "
                "(train.max_skipped). Earlier checkpoints are kept. Lower train.dense.lr or train.tables.lr, or set "
                "train.clip_norm."
            )
        return skipped | {bad_step}

    def below(self, bad_step: int, skipped: set[int]) -> int | None:
        """The step that a checkpoint must lie below: the run was rolled back to those from there on, and no batch could be
        trained on since. None if any checkpoint will do.

        Args:
            skipped: before `bad_step` is added.
        """
        barren = {step for step in self.tried if all(between in skipped for between in range(step + 1, bad_step))}
        return min(barren, default=None)
