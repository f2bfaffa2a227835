"""What `Ranker.embedded` makes of a row's ids, as data: for whatever looks them up without TorchRec."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from features.schema.schema import Schema
from models.ranker import Ranker

Pooling = Literal["single", "mean", "sequence"]


@dataclass(frozen=True)
class Part:
    """A feature looked up in a table.

    Attributes:
        pooling: "single": the row of its id; "mean": of the rows of a list, 0 for an empty one; "sequence": the rows one after
            the other, in the order of the list.
        max_length: of a sequence, the most rows; 0 of others.
    """

    feature: str
    table: str
    pooling: Pooling
    max_length: int = 0


class Layout(NamedTuple):
    """The columns of embedding_BE.

    Attributes:
        parts: in their order; sequences are the last ones. Each sequence has as many rows as the longest may have, the
            missing ones 0, and after all sequences follows a column for each with the length of its list.
        sets: S. A row holds S embeddings of its id; the first of all parts come first, then the second of all, and so on.
    """

    parts: list[Part]
    sets: int


def embedding_layout(ranker: Ranker, schema: Schema) -> Layout:
    """The layout of a ranker's embeddings, which may be on the meta device. schema: that it was built of."""
    times = Counter(feature for table in ranker.tables for feature in table.feature_names)
    places = {
        # As TorchRec names a feature that several tables have.
        f"{feature}@{table.name}" if times[feature] > 1 else feature: (feature, table.name)
        for table in ranker.tables
        for feature in table.feature_names
    }

    def part(name: str) -> Part:
        feature, table = places[name]
        if name in ranker.lengths:
            return Part(feature, table, "sequence", ranker.lengths[name])
        return Part(feature, table, "single" if feature in schema.single else "mean")

    return Layout([part(name) for name in [*ranker.features, *ranker.lengths]], ranker.sets)
