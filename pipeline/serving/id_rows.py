"""From ids to rows of a file: of tables that are stored whole, of those with some rows left out, of managed ones."""

# Shapes: G features, X ids of them, of shape (…, G) or (V,) of one feature, P words of kept rows, S sets, W rows of a set.

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from features.errors import UserError
from features.fit.encoders import MISSING
from features.kinds.tables import Managed
from models.id_map import IdMap
from pipeline.serving.kept_rows import WIDTH, rows_of
from pipeline.serving.manifest import HINT, Lookup, StoredTable

# From ids to rows, int64, of the same shape; raises UserError for an id that a table does not have.
ToRows = Callable[[np.ndarray], np.ndarray]


def whole(lookups: Sequence[Lookup], tables: Sequence[StoredTable]) -> ToRows:
    """Of tables that have a row for each id. tables: of the look-ups."""
    first_G = np.array([table.first for table in tables])
    checked = _checked(lookups, tables)
    return lambda id_X: checked(id_X) + first_G


def kept(
    lookups: Sequence[Lookup], tables: Sequence[StoredTable], word_G: Sequence[int], bits_P2: np.ndarray, rows: int
) -> ToRows:
    """Of tables with some rows left out; ABSENT for an id without a row.

    Args:
        word_G: the first word of a table. bits_P2, rows: as kept_rows.rows_of takes them.
    """
    checked = _checked(lookups, tables)
    base_G = np.array(word_G) * WIDTH
    return lambda id_X: rows_of(checked(id_X) + base_G, bits_P2, rows)


def managed(lookups: Sequence[Lookup], table: StoredTable, ids: IdMap) -> ToRows:
    """Of a managed table."""
    checked = _checked(lookups, [table] * len(lookups))

    def to_rows(id_X: np.ndarray) -> np.ndarray:
        id_N = torch.from_numpy(checked(id_X).ravel())
        row_N = torch.where(id_N == MISSING, MISSING, ids.lookup(id_N))
        return row_N.numpy().reshape(id_X.shape) + table.first

    return to_rows


def map_of(table: StoredTable, id_N: Tensor) -> IdMap:
    """The map of a managed table. id_N: id_SW, of which nothing is copied. Raises UserError where no map has so many ids."""
    settings = Managed.model_construct(rows=len(id_N))  # has the sets and ways that the map was made with
    if settings.sets * settings.ways != len(id_N):
        raise UserError(f"{table.ids}: a map of {len(id_N):,} ids, which cannot be divided into equal sets. {HINT}")
    ids = IdMap(settings, device=torch.device("meta"))
    ids.id_SW = id_N.view(settings.sets, settings.ways)
    return ids


def _checked(lookups: Sequence[Lookup], tables: Sequence[StoredTable]) -> ToRows:
    """The ids as they are."""
    # A negative id is a large one without its sign. Ids of a managed table are hashes.
    limit_G = np.array([1 << 63 if table.ids else table.num_embeddings for table in tables], np.uint64)

    def check(id_X: np.ndarray) -> np.ndarray:
        wrong_X = id_X.view(np.uint64) >= limit_G
        if wrong_X.any():
            place = np.argwhere(wrong_X)[0]
            which = place[-1] if id_X.ndim > 1 else 0
            raise UserError(
                f"an id of {lookups[which].feature} is {id_X[tuple(place)]}, its table has {limit_G[which]:,}: the rows were "
                "encoded by other encoders than the package's"
            )
        return id_X

    return check
