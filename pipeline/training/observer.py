"""Observers of a trainer, for tests, benchmarks and whatever a user wants to see of a run."""

from typing import TYPE_CHECKING

from pipeline.training.step import StepOutput

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class Observer:
    """Sees a trainer at work. Methods do nothing unless they are overridden."""

    def on_start(self, trainer: "Trainer") -> None:
        """Once the run is restored, before its first step."""

    def on_forward(self, trainer: "Trainer", output: StepOutput) -> None:
        """After a forward, before the gradients; `trainer.state.step` steps lie behind it."""

    def on_step(self, trainer: "Trainer", output: StepOutput) -> None:
        """After a step, of which `trainer.state.step` is the number."""

    def on_checkpoint(self, trainer: "Trainer", step: int, seconds: float) -> None:
        """After a checkpoint was begun (checkpoint_async) or written. seconds: that training waited for it."""
