"""The kinds of features that a schema knows, and the tables in which their ids are looked up."""

from typing import Literal

from pydantic import Field, model_validator

from features.source import History, Strict


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


class Table(Strict):
    """An embedding table and how values become its ids: a fitted vocabulary, `hash` buckets, or quantile `bins` of a number."""

    dim: int = Field(16, ge=1)
    vocabulary: Vocabulary | None = None
    hash: int | None = Field(None, ge=1)
    bins: int | None = Field(None, ge=1, le=1024)

    @model_validator(mode="after")
    def _one_way_to_an_id(self) -> "Table":
        if (self.vocabulary is not None) + (self.hash is not None) + (self.bins is not None) > 1:
            raise ValueError("give one of vocabulary, hash and bins")
        return self

    @property
    def counted(self) -> bool:
        """Whether ids are those of a fitted vocabulary."""
        return self.hash is None and self.bins is None


class Categorical(Table):
    """One id a row. It has a table of its own name unless `table` names a shared one."""

    column: str | None = None
    table: str | None = None

    @model_validator(mode="after")
    def _shared_table_decides(self) -> "Categorical":
        own = self.model_fields_set & {"dim", "vocabulary", "hash", "bins"}
        if self.table and own:
            raise ValueError(f"{', '.join(sorted(own))} belong to the shared table {self.table}: set them there")
        return self


class Bag(Categorical):
    """A list of ids a row, mean-pooled; at most the first `max_length` count. It is a column's, or made of earlier rows."""

    separator: str = Field("|", min_length=1)
    max_length: int = Field(50, ge=1)
    bins: None = Field(None, description="a list of numbers has none")
    history: History | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Bag":
        if self.history and self.column:
            raise ValueError("give one of column and history")
        return self
