"""The files of fitted encoders: their names, and their content as untrusted input."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, FiniteFloat

from features.errors import UserError, one_line
from features.parquet_limits import ALWAYS_ALLOWED_BYTES, check_footer
from features.parquet_pages import check_pages, largest_dictionary
from features.parquet_schema import check_nesting
from features.plain_json import Count, read_json, validated
from features.regular_files import local_file, lstat_regular, mounted
from features.schema.schema import Schema

VERSION = 3
MIN_BATCH, MAX_BATCH = 16, 1 << 16  # values that are decoded at once
NO_COUNTS = np.zeros(0, np.int64)
COLUMNS = {"value": (pa.string(), pa.large_string()), "id": (pa.int64(),), "count": (pa.int64(),)}  # of a vocabulary
RESTORE_HINT = "Restore it, or run jobs.preprocess again."


class MomentsEntry(BaseModel):
    """A number's moments in encoders.json."""

    count: Count
    missing: Count
    mean: FiniteFloat
    squares: Annotated[FiniteFloat, Field(ge=0)]


class LabelEntry(BaseModel):
    """The scale of a regression task's labels in encoders.json."""

    mean: FiniteFloat
    std: Annotated[FiniteFloat, Field(gt=0)]
    positive: Annotated[float, Field(gt=0, lt=1)]


class KeptEntry(BaseModel):
    """The encoders of which some were kept, by the encoders_id of their dataset, and the tables that were."""

    encoders: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    tables: list[str]


class Content(BaseModel):
    """What encoders.json holds.

    Attributes:
        num_embeddings: per table. edges: of bins, ascending. counter_means: of smoothed counters. labels: scales of
            regression tasks; datasets of before there were any have none. kept: of a schema that grew.
    """

    version: int
    inputs: str
    num_embeddings: dict[str, Count]
    moments: dict[str, MomentsEntry]
    edges: dict[str, Annotated[list[FiniteFloat], Field(min_length=2)]] = {}
    counter_means: dict[str, FiniteFloat] = {}
    labels: dict[str, LabelEntry] = {}
    kept: KeptEntry | None = None


def vocabulary_file(table: str) -> str:
    """The name of a table's vocabulary, relative to the folder of the encoders."""
    return f"vocabularies/{table}.parquet"


def encoder_files(schema: Schema) -> list[str]:
    """The files of the encoders of a schema: its vocabularies in the order of their names, and encoders.json."""
    tables = (name for name, table in schema.all_tables.items() if table.counted)
    return [*sorted(map(vocabulary_file, tables), key=Path), "encoders.json"]


def read_content(folder: Path, schema: Schema) -> Content:
    """encoders.json of `folder`.

    Raises:
        UserError: it is missing, damaged, of another version, or was fitted for other features.
    """
    file = folder / "encoders.json"
    try:
        found = read_json(folder, "encoders.json")
    except OSError as error:
        raise UserError(f"{folder}: encoders cannot be read ({error}). Run jobs.preprocess again.") from None
    version = found.get("version") if isinstance(found, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise UserError(f"{folder}: encoders of version {version}, this release reads {VERSION}")
    try:
        content = validated(Content, found, file)
    except UserError as error:
        raise UserError(f"{folder}: encoders cannot be read ({error}). Run jobs.preprocess again.") from None
    if content.inputs != schema.inputs_fingerprint:
        raise UserError(
            f"{folder}: encoders were fitted for features {content.inputs[:16]!r}, this schema has "
            f"{schema.inputs_fingerprint}. Use the features of that dataset, or fit new encoders."
        )
    _check_names(content, schema, file)
    for name, edges in content.edges.items():
        bins = schema.features[name].code_bins if name in schema.dense_ranges else schema.all_tables[name].bins
        if len(edges) > 2 * (bins or 0) + 4 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise UserError(
                f"{file}: edges of {name} do not ascend, or are more than those of {bins} bins. {RESTORE_HINT}"
            )
    return content


def _check_names(content: Content, schema: Schema, file: Path) -> None:
    """Raises UserError unless there is an entry for whatever the schema's features need, and for nothing else."""
    binned = {name for name, table in schema.all_tables.items() if table.bins}
    coded = {name for name, feature in schema.features.items() if feature.code_bins}
    if content.kept and (other := set(content.kept.tables) - schema.all_tables.keys()):
        raise UserError(f"{file}: kept has table {min(other)!r}, which the schema has not. {RESTORE_HINT}")
    for what, found, needed in (
        ("num_embeddings", content.num_embeddings.keys(), schema.all_tables.keys()),
        ("moments", content.moments.keys(), schema.dense.keys()),
        ("edges", content.edges.keys(), binned | coded),
        ("counter_means", content.counter_means.keys(), set(schema.smoothed)),
    ):
        if different := found ^ needed:
            name = min(different & needed or different)
            fault = f"has none for {name}" if name in needed else "has one that the schema does not need"
            raise UserError(f"{file}: {what} {fault}. {RESTORE_HINT}")


class Saved(Mapping[str, Any]):
    """The values of saved vocabularies, or their counts: a table's are read when they are first asked for, and kept.

    Args:
        folder: of the encoders. sizes: how many values each table has.
        read: of tables that have been read, both. It may be shared by the values and the counts of the same files.
        counts: whether these are the counts.
    Raises:
        UserError: as `read_vocabulary`, where a table is asked for.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int], read: dict[str, tuple[pa.Array, np.ndarray]], counts: bool
    ) -> None:
        self.folder, self.sizes, self.read, self.counts = folder, sizes, read, counts

    def __getitem__(self, table: str) -> Any:
        if table not in self.read:
            self.read[table] = read_vocabulary(self.folder, table, self.sizes[table])
        return self.read[table][self.counts]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def check_vocabulary(folder: Path, table: str, size: int) -> None:
    """Compares the footer of a vocabulary with its size, and reads no values. Raises UserError as `read_vocabulary`."""
    with _opened(folder, table, size, whole=False):
        pass


def read_vocabulary(folder: Path, table: str, size: int) -> tuple[pa.Array, np.ndarray]:
    """A table's vocabulary: its values, in order, as large strings, and how often each occurs in the train split.

    Args:
        folder: of the encoders. size: how many values there are.
    Returns: the values, and int64 counts, none where the file has no column of them, as before there were any.
    Raises:
        UserError: it is missing, no regular file, has another number of values or other columns, would unpack to more than
            its values can have, or a value or count is none.
    """
    with _opened(folder, table, size, whole=True) as (file, path):
        check_pages(path, file.metadata)
        return _values(file, path), _counts(file, path) if "count" in file.schema_arrow.names else NO_COUNTS


@contextmanager
def _opened(folder: Path, table: str, size: int, whole: bool) -> Iterator[tuple[pq.ParquetFile, Path]]:
    """The vocabulary, and a path on this machine; of one on a store that is there only if `whole`, else the footer is read."""
    name = vocabulary_file(table)
    path, status = folder / name, lstat_regular(folder, name)
    wrong = f"{path} is missing, or does not hold the {size} values that were fitted. {RESTORE_HINT}"
    if status is None:
        raise UserError(wrong)
    try:
        with local_file(path) if whole else nullcontext(path) as local, _parquet(local) as file:
            if file.metadata.num_rows != size:
                raise UserError(wrong)
            if not _is_vocabulary(file.schema_arrow):
                raise UserError(
                    f"{path}: its columns are not those of a vocabulary (value: text, id and count: int64). {RESTORE_HINT}"
                )
            check_footer(file.metadata, path, status.st_size, whole=True)
            yield file, local
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}). {RESTORE_HINT}") from None


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    with path.open("rb") as content:
        check_nesting(content, path)
        with pq.ParquetFile(path if mounted(path) else content) as file:
            yield file


def _is_vocabulary(columns: pa.Schema) -> bool:
    names = set(columns.names)
    return (
        len(names) == len(columns)
        and {"value", "id"} <= names <= COLUMNS.keys()
        and all(column.type in COLUMNS[column.name] for column in columns)
    )


def _counts(file: pq.ParquetFile, path: Path) -> np.ndarray:
    found = file.read(["count"], use_threads=False)["count"]
    if found.null_count or (count_V := found.to_numpy()).min(initial=0) < 0:
        raise UserError(f"{path}: the count of a value is missing or negative. {RESTORE_HINT}")
    return count_V


def _values(file: pq.ParquetFile, path: Path) -> pa.Array:
    """Values that differ have no more bytes than their pages; a value that is repeated without end may have any number."""
    footer = file.metadata
    unpacked = sum(footer.row_group(i).column(0).total_uncompressed_size for i in range(footer.num_row_groups))
    largest = largest_dictionary(path, footer, "value")
    batch = min(max(ALWAYS_ALLOWED_BYTES // max(largest, 1), MIN_BATCH), MAX_BATCH)
    found, size = [], 0
    for part in file.iter_batches(batch, columns=["value"], use_threads=False):
        values = part.column(0)
        size += pc.sum(pc.binary_length(values)).as_py() or 0
        if values.null_count or size > unpacked:
            raise UserError(f"{path}: a value is there more than once, or missing. {RESTORE_HINT}")
        found.append(values.cast(pa.large_string()))
    return pa.chunked_array(found, pa.large_string()).combine_chunks()
