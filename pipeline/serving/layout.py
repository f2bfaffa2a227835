"""How the embeddings of a package lie: what its manifest says of tables and look-ups, checked."""

# Shapes: P numbers of all pooled look-ups of a row.

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from features.errors import UserError
from models.id_map import FIRST
from pipeline.serving.kept_rows import words
from pipeline.serving.manifest import HINT, Manifest
from pipeline.serving.row_formats import row_bytes

MAX_WIDTH = 1 << 24  # numbers of a row's embeddings: 64 MiB


@dataclass
class FileLayout:
    """The look-ups in one file, by their places in the manifest.

    Attributes:
        rows: of the file. dim: numbers of each.
        kept: where some rows are left out, the file that has the ids of the first `kept_rows` ones; kept_words: how many words
            it has.
        blocks: of features of one id, whose ids become rows in one way: of tables stored whole, of those with some rows left
            out, or of one managed table.
        means, sequences: of features of lists.
    """

    rows: int
    dim: int
    kept: str | None = None
    kept_rows: int = 0
    kept_words: int = 0
    blocks: dict[str, list[int]] = field(default_factory=dict)
    means: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)

    @property
    def pooled(self) -> list[int]:
        """All but sequences, in the order in which they are looked up."""
        return [place for block in self.blocks.values() for place in block] + self.means


@dataclass(frozen=True)
class Layout:
    """The embeddings of a row.

    Attributes:
        single: the features of one id, in their order in a row. sequences: features, in their order. longest: of their rows.
        files: by name. order_P: where each column of the pooled look-ups lies among those of file after file; None: there.
        width: numbers in all.
    """

    single: list[str]
    sequences: list[str]
    longest: int
    files: dict[str, FileLayout]
    order_P: Tensor | None
    width: int


def layout_of(folder: Path, manifest: Manifest) -> Layout:
    """The layout of a package. Raises UserError for a manifest that contradicts itself."""
    files = file_layouts(folder, manifest)
    lookups = manifest.lookups
    for place, lookup in enumerate(lookups):
        if (table := manifest.tables.get(lookup.table)) is None:
            raise _wrong(folder, f"look-up of {lookup.feature} in {lookup.table}, which is no table")
        file = files[table.file]
        if lookup.pooling == "single":
            block = f"of {lookup.table}" if table.ids else "kept" if table.kept else "whole"
            file.blocks.setdefault(block, []).append(place)
        else:
            (file.means if lookup.pooling == "mean" else file.sequences).append(place)
    sequences = [lookup for lookup in lookups if lookup.pooling == "sequence"]
    pooled = len(lookups) - len(sequences)
    if not pooled + len(sequences) or [*lookups[pooled:]] != sequences:
        raise _wrong(folder, "no look-up, or a sequence before others")
    if sequences and (manifest.sets > 1 or len({manifest.tables[lookup.table].file for lookup in sequences}) > 1):
        raise _wrong(folder, "sequences of several widths, or with several sets")
    if any(file.dim % manifest.sets for file in files.values()):
        raise _wrong(folder, f"a table whose dim is no multiple of {manifest.sets} sets")
    longest = max((lookup.max_length for lookup in sequences), default=0)
    dims = [manifest.tables[lookup.table].dim for lookup in lookups]
    width = sum(dims[:pooled]) + sum(dims[pooled:]) * longest + len(sequences)
    if width > MAX_WIDTH:
        raise _wrong(folder, f"{width:,} numbers of embeddings a row, {MAX_WIDTH:,} are allowed")
    order_P = _order(files, dims[:pooled], manifest.sets)
    single = list(dict.fromkeys(lookup.feature for lookup in lookups if lookup.pooling == "single"))
    used = {name: file for name, file in files.items() if file.pooled or file.sequences}
    return Layout(single, [lookup.feature for lookup in sequences], longest, used, order_P, width)


def file_layouts(folder: Path, manifest: Manifest) -> dict[str, FileLayout]:
    """The files of the tables, whose rows lie one table after the other, those with rows left out first; without look-ups.

    Raises:
        UserError: a manifest that contradicts itself.
    """
    files: dict[str, FileLayout] = {}
    for name, table in sorted(manifest.tables.items(), key=lambda item: (item[1].file, item[1].first)):
        file = files.setdefault(table.file, FileLayout(0, table.dim, table.kept))
        if table.dim != file.dim or table.first != file.rows:
            raise _wrong(folder, f"table {name} does not begin where the one before it ends, or has another dim")
        if not (0 < table.rows <= table.num_embeddings if table.kept else table.rows == table.num_embeddings > 0):
            raise _wrong(folder, f"table {name} has {table.rows:,} rows of {table.num_embeddings:,}")
        if table.kept and (table.kept != file.kept or file.kept_rows < file.rows):
            raise _wrong(folder, f"table {name} with rows left out lies behind one that is whole")
        if table.ids and (table.kept or table.rows <= FIRST):
            raise _wrong(folder, f"table {name} has a map of ids for {table.rows:,} rows")
        file.rows += table.rows
        file.kept_rows += table.rows if table.kept else 0
        file.kept_words += words(table.num_embeddings) if table.kept else 0
    for name, file in files.items():
        size, listed = file.rows * row_bytes(manifest.format, file.dim), manifest.files.get(name)
        if listed is None or listed.bytes != size:
            raise _wrong(folder, f"{name} has {listed.bytes if listed else 0:,} bytes, its tables {size:,}")
    return files


def kept_words(manifest: Manifest, file: str) -> dict[str, int]:
    """Of the tables of a file with some rows left out, the first word of each in their file of bits (kept_rows)."""
    found, end = {}, 0
    for name, table in sorted(manifest.tables.items(), key=lambda item: item[1].first):
        if table.file == file and table.kept:
            found[name], end = end, end + words(table.num_embeddings)
    return found


def _order(files: dict[str, FileLayout], dims: list[int], sets: int) -> Tensor | None:
    """order_P of pooled look-ups, of which each has so many numbers; see Layout."""
    first, end = {}, 0
    for file in files.values():
        for place in file.pooled:
            first[place], end = end, end + dims[place]
    columns = [np.arange(first[place], first[place] + dim).reshape(sets, -1) for place, dim in enumerate(dims)]
    if not columns:
        return None
    order_P = torch.from_numpy(np.concatenate(columns, 1).ravel())
    return None if torch.equal(order_P, torch.arange(len(order_P))) else order_P


def _wrong(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: its manifest contradicts itself: {what}. {HINT}")
