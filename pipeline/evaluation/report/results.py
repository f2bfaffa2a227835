"""What reports are made of: the records of one split of one dataset, and the oracle's metrics."""

from dataclasses import dataclass
from typing import Any

from features.schema.schema import Split
from pipeline.run.run import Run


@dataclass(frozen=True)
class Results:
    """A run's evaluations.

    Attributes:
        dataset: its name (see Dataset.name). kinds: of the tasks.
        records: one for each step, in order. oracle: metrics per task, None where the true probabilities are not known.
    """

    run: Run
    split: Split
    dataset: str
    kinds: dict[str, str]
    records: list[dict[str, Any]]
    oracle: dict[str, dict[str, Any]] | None
