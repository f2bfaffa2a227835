"""The tables of a checkpoint as files of a package, read and written some rows at a time."""

# Shapes: N rows of a block, D numbers of a row, W bytes of one, K rows that are kept of a table, P words of their bits.

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from features.errors import UserError
from features.fit.encoders import MISSING
from features.schema.schema import Schema
from models.embedding_layout import embedding_layout
from models.managed import managed_tables
from models.ranker import Ranker, table_weights
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.needed_rows import needed_rows
from pipeline.run import checkpoint
from pipeline.run.checkpoint.index import read_index
from pipeline.run.run import Run
from pipeline.serving.kept_rows import bits_of
from pipeline.serving.manifest import Lookup, StoredTable, TableFormat
from pipeline.serving.row_formats import stored
from pipeline.storage.files import make_folder

BLOCK_BYTES = 32 << 20  # of a table's numbers in float32, that are in memory at once
FOLDER = "tables"

Kept = Mapping[str, np.ndarray]  # of tables of a schema the ids whose rows are stored, ascending int64


class TablePart(NamedTuple):
    """A table's rows in a file of several.

    Attributes:
        name: of the ranker's table. weight: its full name in a checkpoint. rows: of the checkpoint's tensor.
        kept_K: those that are stored, ascending; None: all.
    """

    name: str
    weight: str
    rows: int
    kept_K: np.ndarray | None

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        return self.rows if self.kept_K is None else len(self.kept_K)


class TablesFile(NamedTuple):
    """A file of tables of one width, those with rows left out first. kept: the file of their ids, where there are such."""

    name: str
    dim: int
    parts: list[TablePart]
    kept: str | None


class MapFile(NamedTuple):
    """A file of a managed table's map of ids. ids: its full name in a checkpoint. sets, ways: its shape."""

    name: str
    table: str
    ids: str
    sets: int
    ways: int


def occurring_rows(dataset: Dataset) -> dict[str, np.ndarray]:
    """Of each table that is not managed the ids that occur in the train split, ascending.

    Those that stand for missing values and for values outside of a vocabulary are always among them: new rows have them.

    Raises:
        UserError: as needed_rows.
    """
    found = {}
    for table, id_K in needed_rows(dataset, ["train"]).items():
        unknown = dataset.encoders.unknown_ids(table) or range(0)
        found[table] = np.union1d(id_K, np.arange(unknown.start, unknown.stop, dtype=np.int64))
    return found


def write_tables(
    run: Run, step: int, ranker: Ranker, schema: Schema, form: TableFormat, kept: Kept | None, folder: Path
) -> tuple[dict[str, StoredTable], list[Lookup], list[str]]:
    """Writes the tables of a checkpoint, whatever ranks have written it and however they had sharded them.

    Memory does not depend on the size of the tables.

    Args:
        run, step: of the checkpoint, which the caller has checked, and keeps from being deleted (checkpoint.reading).
        ranker: of it; its tables may be on the meta device. schema: of it.
        kept: the rows that are stored of the tables that are in it (occurring_rows); None: all rows of all tables. Managed
            tables are stored whole.
        folder: of the package.
    Returns: the manifest's tables and lookups, and the names of the files that were written.
    Raises:
        UserError: a checkpoint without these tables, or a number that is not finite or beyond the range of the format.
    """
    path = checkpoint.folder(run.checkpoints, step)
    files, maps = table_files(ranker, schema, kept), map_files(ranker, schema)
    make_folder(folder / FOLDER)
    names = []
    for file in files:
        with (folder / file.name).open("xb") as opened:
            for byte_NW in blocks(path, file, form):
                opened.write(byte_NW.numpy().data)
        names.append(file.name)
        if file.kept:
            with (folder / file.kept).open("xb") as opened:
                for bits_P2 in kept_blocks(file):
                    opened.write(bits_P2.data)
            names.append(file.kept)
    for found in maps:
        with (folder / found.name).open("xb") as opened:
            for id_NW in map_blocks(path, found):
                opened.write(id_NW.numpy().data)
        names.append(found.name)
    return stored_tables(files, maps), lookups(ranker, schema), names


def lookups(ranker: Ranker, schema: Schema) -> list[Lookup]:
    """The manifest's look-ups."""
    return [Lookup(**asdict(part)) for part in embedding_layout(ranker, schema).parts]


def stored_tables(files: list[TablesFile], maps: list[MapFile]) -> dict[str, StoredTable]:
    """The manifest's tables."""
    ids = {found.table: found.name for found in maps}
    tables = {}
    for file in files:
        first = 0
        for part in file.parts:
            tables[part.name] = StoredTable(
                file=file.name,
                first=first,
                rows=part.stored,
                dim=file.dim,
                num_embeddings=part.rows,
                kept=None if part.kept_K is None else file.kept,
                ids=ids.get(part.name),
            )
            first += part.stored
    return tables


def table_files(ranker: Ranker, schema: Schema, kept: Kept | None) -> list[TablesFile]:
    """The files of a ranker's tables, by width. Raises UserError for kept rows that are none of a table's."""
    weights, by_dim = table_weights(ranker), dict[int, list[TablePart]]()
    for table in ranker.tables:
        of_schema = schema.table_of(table.feature_names[0])
        kept_K = None if schema.all_tables[of_schema].managed else (kept or {}).get(of_schema)
        if kept_K is not None:
            _check_kept(table.name, kept_K, table.num_embeddings)
        part = TablePart(table.name, f"model.{weights[table.name]}", table.num_embeddings, kept_K)
        by_dim.setdefault(table.embedding_dim, []).append(part)
    files = []
    for dim, parts in sorted(by_dim.items()):
        parts.sort(key=lambda part: part.kept_K is None)
        name = f"{FOLDER}/dim-{dim:05d}"
        files.append(TablesFile(f"{name}.bin", dim, parts, None if parts[0].kept_K is None else f"{name}.kept"))
    return files


def map_files(ranker: Ranker, schema: Schema) -> list[MapFile]:
    """The files of the maps of a ranker's managed tables."""
    if ranker.managed is None:
        return []
    return [
        MapFile(
            f"{FOLDER}/ids-{number:05d}.bin", table, f"model.managed.maps.{table}.id_SW", managed.sets, managed.ways
        )
        for number, (table, managed) in enumerate(managed_tables(schema).items())
    ]


def kept_blocks(file: TablesFile) -> Iterator[np.ndarray]:
    """What its file of kept rows holds, table by table (pipeline.serving.kept_rows)."""
    before = 0
    for part in file.parts:
        if part.kept_K is not None:
            yield bits_of(part.kept_K, part.rows, before)
            before += len(part.kept_K)


def blocks(path: Path, file: TablesFile, form: TableFormat) -> Iterator[Tensor]:
    """byte_NW of successive rows of a file, uint8, some at a time.

    Args:
        path: of the checkpoint.
    Raises:
        UserError: as write_tables, naming the table and its row.
    """
    step = max(1, BLOCK_BYTES // (4 * file.dim))
    index = read_index(path, checkpoint.read(path))
    for part in file.parts:
        for first in range(0, part.stored, step):
            end = min(first + step, part.stored)
            row_N = np.arange(first, end) if part.kept_K is None else part.kept_K[first:end]
            value_ND = torch.empty(end - first, file.dim)
            checkpoint.load_rows(path, {part.weight: (row_N, value_ND)}, index)
            try:
                yield stored(value_ND, form)
            except UserError as error:
                where = f"{path}: table {part.name}, rows {row_N[0]:,} to {row_N[-1]:,}"
                raise UserError(f"{where}: {error}. Export another checkpoint, or with another tables=.") from None


def map_blocks(path: Path, found: MapFile) -> Iterator[Tensor]:
    """Successive sets of a map, id_NW, int64, some at a time."""
    step = max(1, BLOCK_BYTES // (8 * found.ways))
    index = read_index(path, checkpoint.read(path))
    for first in range(0, found.sets, step):
        row_N = np.arange(first, min(first + step, found.sets))
        id_NW = torch.empty(len(row_N), found.ways, dtype=torch.int64)
        checkpoint.load_rows(path, {found.ids: (row_N, id_NW)}, index)
        yield id_NW


def _check_kept(table: str, kept_K: np.ndarray, rows: int) -> None:
    ascending = kept_K.ndim == 1 and kept_K.dtype == np.int64 and (kept_K[1:] > kept_K[:-1]).all()
    if not len(kept_K) or not ascending or kept_K[0] != MISSING or kept_K[-1] >= rows:
        raise UserError(
            f"table {table} has {rows:,} rows: the rows to keep are not some of them, ascending from {MISSING}"
        )
