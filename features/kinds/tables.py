"""Embedding tables of a schema, and how values become their ids."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from features.source import Strict

WAYS = 64  # rows of a managed table among which one is evicted
VECTOR = 4  # numbers that FBGEMM's kernels take at once: it refuses other widths on CPUs as well

MAX_COUNT = 10**10  # of ids, rows and occurrences: beyond what one table can hold


class Vocabulary(Strict):
    """Ids for values seen at least `min_count` times in the train split, the `max_size` most frequent of them.

    Other values share `unknown` ids, by a hash.
    """

    min_count: int = Field(1, ge=1, le=MAX_COUNT)
    max_size: int | None = Field(None, ge=1, le=MAX_COUNT)
    unknown: int = Field(1, ge=1, le=MAX_COUNT)


class Managed(Strict):
    """Rows for an unbounded number of values: a value owns a row from its first training step until it is evicted.

    A value belongs to one of `sets` of `ways` rows by its hash. Where all rows of its set are taken, it gets the row of the
    value that was seen longest ago (`lru`), or least often (`lfu`; it takes the count over with the row, as in Space-Saving,
    Metwally et al. 2005, so that nothing stays forever). With 1.5 rows per live value hardly a set overflows.
    """

    rows: int = Field(ge=1, le=MAX_COUNT, description="at least that many")
    evict: Literal["lru", "lfu"] = "lru"

    @property
    def sets(self) -> int:
        """Sets of rows; it depends on `rows` alone, so that any number of ranks can share them."""
        return -(-self.rows // WAYS)

    @property
    def ways(self) -> int:
        """Rows of a set."""
        return -(-self.rows // self.sets)


class Table(Strict):
    """An embedding table and how values become its ids.

    It is a fitted vocabulary, `hash` buckets, quantile `bins` of a number, or `managed`: the ids are hashes of 63 bits, and
    which of them have a row is learnt with the model.
    """

    dim: int = Field(16, ge=1, le=65_536)
    vocabulary: Vocabulary | None = None
    hash: int | None = Field(None, ge=1, le=MAX_COUNT)
    bins: int | None = Field(None, ge=1, le=1024)
    managed: Managed | None = None

    @field_validator("dim")
    @classmethod
    def _whole_vectors(cls, dim: int) -> int:
        if dim % VECTOR:
            below, above = dim // VECTOR * VECTOR, -(-dim // VECTOR) * VECTOR
            nearest = f"{below} or {above}" if below else str(above)
            raise ValueError(f"{dim} is not a multiple of {VECTOR}, as FBGEMM's tables need: make it {nearest}")
        return dim

    @model_validator(mode="after")
    def _one_way_to_an_id(self) -> "Table":
        if sum(way is not None for way in (self.vocabulary, self.hash, self.bins, self.managed)) > 1:
            raise ValueError("give one of vocabulary, hash, bins and managed")
        return self

    @property
    def counted(self) -> bool:
        """Whether ids are those of a fitted vocabulary."""
        return self.hash is None and self.bins is None and self.managed is None
