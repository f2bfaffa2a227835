"""What the steps of a job know of it: settings, and what steps before them reported."""

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from features.fit.encoders import Encoders
from features.schema.schema import Schema
from pipeline.ingest.steps.write import Order

Work = dict[str, Any]  # what a step is given, and what it reports
IMPRESSIONS = "impressions"  # the stream that outcomes belong to
RESERVE_FILE = "reserve"  # a file that makes room for a last word when the disk is full


@dataclass(frozen=True)
class Job:
    """What every step knows.

    Attributes:
        staging: folder that becomes the dataset; scratch/ in it holds what goes from step to step.
        buckets: of joins and histories.
        counts_all: whether statistics are of all rows, or of the train split.
        memory: what a worker has read already.
    """

    schema: Schema
    staging: Path
    buckets: int
    order: Order
    seed: int
    rows_per_row_group: int
    counts_all: bool
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def scratch(self) -> Path:
        """Where what goes from step to step lies."""
        return self.staging / "scratch"

    def aside(self, name: str) -> Path:
        """A file of this attempt."""
        return self.scratch / f"{name}-{uuid.uuid4().hex}"

    @property
    def joins(self) -> bool:
        """Whether rows wait for something before they can be labelled."""
        return bool(self.schema.source.outcomes or self.schema.histories)

    @property
    def encoders(self) -> Encoders:
        """Loaded once a worker."""
        if "encoders" not in self.memory:
            self.memory["encoders"] = Encoders.load(self.staging / "encoders", self.schema)
        return self.memory["encoders"]

    def found(self, step: str) -> list[Work]:
        """The reports of a step that was done, in the order of its work; none where the job has no such step."""
        if step not in self.memory:
            path = self.scratch / f"{step}.json"
            if not path.exists():
                return []
            self.memory[step] = json.loads(path.read_text())
        return self.memory[step]

    def parts(self, stream: str = IMPRESSIONS) -> list[Work]:
        """The parts of a stream in the order of its rows."""
        return [part for report in self.found("read") if report["stream"] == stream for part in report["parts"]]

    def labelled(self) -> list[Work]:
        """What `label` reported of each part, be it a step of its own or not."""
        return self.found("label") if self.joins else self.parts()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "memory": {}}
