"""The kinds of features that a schema knows, and the tables in which their ids are looked up."""

from typing import Literal

from pydantic import Field, model_validator

from features.schema.source import History, Strict

WAYS = 64  # rows of a managed table among which one is given up


class Dense(Strict):
    """A number. A missing value becomes the mean of the train split, and a column NAME_missing on request."""

    column: str | None = None
    transform: Literal["none", "log1p"] = "none"
    standardize: bool = True
    missing_flag: bool = False
    piecewise: int | None = Field(None, ge=1, le=1024, description="bins of the code beside the number (models.inputs)")


class Vocabulary(Strict):
    """Ids for values seen at least `min_count` times in the train split, the `max_size` most frequent of them.

    Other values share `unknown` ids, dealt by a hash.
    """

    min_count: int = Field(1, ge=1)
    max_size: int | None = Field(None, ge=1)
    unknown: int = Field(1, ge=1)


class Managed(Strict):
    """Rows for values without bound: each has a row to itself from when it is first trained on until another needs the row.

    A value belongs to one of `sets` of `ways` rows by its hash. Where all rows of its set are taken, it gets the row of the
    value that was seen longest ago (`lru`), or least often (`lfu`; it takes the count over with the row, as in Space-Saving,
    Metwally et al. 2005, so that nothing stays forever). About 1.5 rows for each value alive leave hardly a set too small.
    """

    rows: int = Field(ge=1, description="at least that many")
    evict: Literal["lru", "lfu"] = "lru"

    @property
    def sets(self) -> int:
        """Sets of rows; it depends on `rows` alone, so that any number of ranks can share them out."""
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

    dim: int = Field(16, ge=1)
    vocabulary: Vocabulary | None = None
    hash: int | None = Field(None, ge=1)
    bins: int | None = Field(None, ge=1, le=1024)
    managed: Managed | None = None

    @model_validator(mode="after")
    def _one_way_to_an_id(self) -> "Table":
        if sum(way is not None for way in (self.vocabulary, self.hash, self.bins, self.managed)) > 1:
            raise ValueError("give one of vocabulary, hash, bins and managed")
        return self

    @property
    def counted(self) -> bool:
        """Whether ids are those of a fitted vocabulary."""
        return self.hash is None and self.bins is None and self.managed is None


class Categorical(Table):
    """One id a row. It has a table of its own name unless `table` names a shared one."""

    column: str | None = None
    table: str | None = None

    @model_validator(mode="after")
    def _shared_table_decides(self) -> "Categorical":
        own = self.model_fields_set & {"dim", "vocabulary", "hash", "bins", "managed"}
        if self.table and own:
            raise ValueError(f"{', '.join(sorted(own))} belong to the shared table {self.table}: set them there")
        return self


class Bag(Categorical):
    """A list of ids a row; at most the first `max_length` count. It is a column's, or made of earlier rows.

    `pooling: mean` gives the mean of its items' embeddings. `sequence` keeps them apart, in order, for what reads them one by
    one; a model that does not sees their sum, weighed by how they fit the candidate (models.sequences).
    """

    separator: str = Field("|", min_length=1)
    max_length: int = Field(50, ge=1)
    pooling: Literal["mean", "sequence"] = "mean"
    bins: None = Field(None, description="a list of numbers has none")
    history: History | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Bag":
        if self.history and self.column:
            raise ValueError("give one of column and history")
        return self
