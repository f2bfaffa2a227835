"""What statistics.json may hold: checked where it is read, since a dataset may be untrusted."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from features.plain_json import Count
from features.schema.splits import Split

MAX_ENTRIES = 4096  # entries of a list of edges, shares, values or groups

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Number = FiniteFloat | None
Numbers = Annotated[list[FiniteFloat], Field(max_length=MAX_ENTRIES)]
Shares = Annotated[list[Annotated[FiniteFloat, Field(ge=0, le=1 + 1e-6)]], Field(max_length=MAX_ENTRIES)]


class Histogram(BaseModel):
    """Edges of bins and counts in them."""

    edges: Numbers
    counts: Annotated[list[Count], Field(max_length=MAX_ENTRIES)]

    @model_validator(mode="after")
    def _edges_on_either_side_of_each_count(self) -> "Histogram":
        if len(self.edges) != (len(self.counts) + 1 if self.counts else 0):
            raise ValueError("a histogram needs one edge more than counts, or none of both")
        return self


class Cells(BaseModel):
    """Edges between cells and shares in them."""

    edges: Numbers
    shares: Shares

    @model_validator(mode="after")
    def _edges_between_shares(self) -> "Cells":
        if self.shares and len(self.shares) != len(self.edges) + 1:
            raise ValueError("cells need one share more than edges")
        return self


class NumberEntry(BaseModel):
    """Statistics of a number."""

    missing: Share | None
    mean: Number
    std: Number
    min: Number
    max: Number
    quantiles: dict[str, FiniteFloat]
    histogram: Histogram
    cells: Cells


class IdEntry(BaseModel):
    """Statistics of an id feature: of one with a vocabulary `vocabulary` to `other_unknown`, of a hashed one `groups`.

    `markers` are values that look like missing ones, with their counts.
    """

    missing: Share | None
    length: Number = None
    groups: Shares | None = None
    vocabulary: Count | None = None
    seen: Count | None = None
    distinct: Count | None = None
    unknown: Share | None = None
    top: (
        Annotated[list[Annotated[list[str | float], Field(min_length=2, max_length=2)]], Field(max_length=MAX_ENTRIES)]
        | None
    ) = None
    other_known: Share | None = None
    other_unknown: Share | None = None
    markers: Annotated[dict[str, Count], Field(max_length=MAX_ENTRIES)] = {}

    @model_validator(mode="after")
    def _of_a_vocabulary_or_hashed(self) -> "IdEntry":
        known = (self.vocabulary, self.seen, self.distinct, self.top, self.other_known, self.other_unknown)
        if any((part is None) != (self.groups is not None) for part in known):
            raise ValueError("needs groups, or else vocabulary, seen, distinct, top, other_known and other_unknown")
        if any(
            not isinstance(value, str) or isinstance(share, str) or not 0 <= share <= 1
            for value, share in self.top or []
        ):
            raise ValueError("top lists values with their shares")
        return self


class OtherEntry(BaseModel):
    """Statistics of any other feature."""

    missing: Share | None


class KeptEntry(BaseModel):
    """Statistics of a kept column."""

    type: Literal["text", "integer", "number"]
    missing: Share | None


class TaskEntry(BaseModel):
    """Statistics of a task's labels."""

    kind: Literal["binary", "regression"]
    observed: Share | None
    mean: Number
    std: Number


class DriftEntry(BaseModel):
    """How far a feature drifted."""

    feature: str
    psi: FiniteFloat
    chance: FiniteFloat
    verdict: Literal["stable", "moves", "shifted"]
    missing: Share | None
    missing_before: Share | None
    unknown: Share | None
    unknown_before: Share | None


class SplitEntry(BaseModel):
    """Statistics of a feature in one split."""

    missing: Share | None
    unknown: Share | None = None
    mean: Number = None


class CardContent(BaseModel):
    """A card (see pipeline.dataset.card.card.card)."""

    version: int
    rows: Count
    numbers: dict[str, NumberEntry]
    ids: dict[str, IdEntry]
    others: dict[str, OtherEntry] = {}
    kept: dict[str, KeptEntry] = {}
    tasks: dict[str, TaskEntry]
    correlations: list[list[Number]]
    drift: list[DriftEntry] = []
    splits: dict[Split, dict[str, SplitEntry]] = {}

    @model_validator(mode="after")
    def _a_correlation_for_each_two_tasks(self) -> "CardContent":
        if len(self.tasks) > 1 and [len(row) for row in self.correlations] != [len(self.tasks)] * len(self.tasks):
            raise ValueError("correlations are not those of each two tasks")
        return self
