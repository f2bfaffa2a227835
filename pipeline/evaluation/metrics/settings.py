"""Settings of what an evaluation measures: slices, clusters and groups of rows, and how exactly."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator

from pipeline.run.run import config_hash


class Edges(BaseModel):
    """Ranges of a number: below the first edge, between neighbours (the lower one included), from the last on."""

    model_config = ConfigDict(extra="forbid")
    column: str
    edges: Annotated[list[FiniteFloat], Field(min_length=1, max_length=1000)]

    @field_validator("edges")
    @classmethod
    def _ascend(cls, edges: list[float]) -> list[float]:
        if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError("edges must ascend")
        return edges


class Sql(BaseModel):
    """The rows for which a condition over kept columns holds."""

    model_config = ConfigDict(extra="forbid")
    sql: str


Slice = str | Annotated[list[str], Field(min_length=2, max_length=4)] | Edges | Sql


class MeasureConfig(BaseModel):
    """What is measured beside the whole split, and how.

    Attributes:
        slices: a column, a list of columns (their cross), {column, edges}, or {sql}.
        top: most frequent values of a dimension that are slices; ranges, days and hours all are. min_rows: of a slice,
            in the whole split.
        cold_start: slices of the ids that training has not seen, or in fewer than `rare` rows.
        by_time: slices by day and hour (UTC), where the schema has an event time that is no plain order.
        buckets: of the jackknife; 1: no intervals. cluster_by: kept column whose rows share a bucket, or row; None: the user,
            where a column of users is kept, or else row.
        group: kept column within whose rows GAUC and NDCG rank; None: the cluster. ndcg: its k.
        share: of the clusters that are scored, by the hash of `share_by` (None: of the cluster), the same in every evaluation.
        memory: GiB that the rows kept for ranking metrics take on all ranks together; where they would take more, those of
            half of the clusters are kept, of a quarter, ...: see pipeline.evaluation.metrics.kept_rows.
    """

    model_config = ConfigDict(extra="forbid")
    slices: list[Slice] = []
    top: int = Field(20, ge=1, le=1000)
    min_rows: int = Field(100, ge=1)
    cold_start: bool = True
    rare: int = Field(10, ge=1)
    by_time: list[Literal["day", "hour"]] = ["day", "hour"]
    buckets: int = Field(100, ge=1, le=1000)
    cluster_by: str | None = None
    group: str | None = None
    ndcg: int = Field(10, ge=1)
    share: float = Field(1.0, gt=0, le=1)
    share_by: str | None = None
    memory: float = Field(8.0, gt=0)

    @property
    def hash(self) -> str:
        """Of the settings that the figures depend on, but for memory, and for share, which is recorded by itself."""
        left_out = {"share", "memory"} if self.share < 1 else {"share", "memory", "share_by"}
        return config_hash(self.model_dump(mode="json", include=MeasureConfig.model_fields.keys() - left_out))
