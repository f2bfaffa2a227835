"""The content of statistics.json, checked where it is read: a card may come from elsewhere."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Missing(_Part):
    missing: float | None


class _Histogram(_Part):
    edges: list[float]
    counts: list[int]

    @model_validator(mode="after")
    def _fits(self) -> "_Histogram":
        if len(self.edges) != len(self.counts) + bool(self.counts):
            raise ValueError("a histogram has an edge more than counts")
        return self


class _Cells(_Part):
    edges: list[float]
    shares: list[float]

    @model_validator(mode="after")
    def _fits(self) -> "_Cells":
        if len(self.shares) != len(self.edges) + 1:
            raise ValueError("there is a share more than edges")
        return self


class _Number(_Missing):
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    quantiles: dict[str, float]
    histogram: _Histogram
    cells: _Cells


class _Hashed(_Missing):
    length: float | None = None
    groups: list[float]


class _Counted(_Missing):
    length: float | None = None
    vocabulary: int
    seen: int
    distinct: int
    unknown: float | None
    top: list[tuple[str, float]]
    other_known: float
    other_unknown: float


class _Task(_Part):
    kind: str
    observed: float | None
    mean: float | None
    std: float | None


class _Drift(_Part):
    feature: str
    psi: float
    chance: float
    verdict: Literal["stable", "moves", "shifted"]
    missing: float
    missing_before: float
    unknown: float | None
    unknown_before: float | None


class CardContent(_Part):
    """What `card` returns, as a model; unknown keys are left out."""

    version: int
    rows: int
    numbers: dict[str, _Number]
    ids: dict[str, _Counted | _Hashed]
    others: dict[str, _Missing] = {}
    tasks: dict[str, _Task]
    correlations: list[list[float | None]]
    drift: list[_Drift] = []

    @model_validator(mode="after")
    def _fits(self) -> "CardContent":
        if {len(self.tasks)} != {len(self.correlations), *map(len, self.correlations)}:
            raise ValueError("correlations are of other tasks")
        return self
