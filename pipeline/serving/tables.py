"""Embeddings of encoded rows, from the mapped files of a package's tables: what `Ranker.embedded` gives of its own."""

# Shapes: B rows, F features of one id, G of them in a block, X ids of a block of any shape, V ids of lists, K lists, N rows of
# one file that are looked up, R rows of a file, W bytes of one, D numbers of one, P2 words of its kept rows, J sequences, L
# rows of the longest, S sets, P numbers of all pooled look-ups, E numbers of all embeddings.

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from features.errors import UserError
from models.id_map import FIRST
from pipeline.serving import id_rows, kept_rows
from pipeline.serving.deltas import changed_rows, check_base, rows_name
from pipeline.serving.encoded import Encoded
from pipeline.serving.id_rows import ToRows
from pipeline.serving.layout import FileLayout, Layout, kept_words, layout_of
from pipeline.serving.manifest import Manifest, TableFormat
from pipeline.serving.mapped import mapped, tensor
from pipeline.serving.row_formats import looked_up, row_bytes

Source = tuple[Path, Manifest]  # a package or delta


@dataclass(frozen=True)
class File:
    """The look-ups in the tables of one width.

    Attributes:
        byte_RW: all rows. form: theirs. absent: whether ids may have none.
        single: blocks of features of one id: their columns in id_BF, and what makes rows of their ids.
        means, sequences: features of lists, and the same of each. longest: L, of all sequences.
    """

    byte_RW: Tensor
    form: TableFormat
    absent: bool
    single: list[tuple[slice | np.ndarray, ToRows]]
    means: list[tuple[str, ToRows]]
    sequences: list[tuple[str, ToRows]]
    longest: int

    def embed(self, rows: Encoded) -> tuple[list[Tensor], list[Tensor]]:
        """Pooled look-ups, each of shape (B, numbers): block by block, then means. And sequences, each (B, L D)."""
        id_BF = rows.id_BF.numpy()
        row = [to_rows(id_BF[:, columns]).ravel() for columns, to_rows in self.single]
        lists = [*self.means, *self.sequences]
        row += [to_rows(rows.lists[feature].id_V.numpy()) for feature, to_rows in lists]
        value_ND = self._values(row[0] if len(row) == 1 else np.concatenate(row))
        value = value_ND.split([len(row_X) for row_X in row])
        pooled = [value_XD.reshape(len(rows), -1) for value_XD in value[: len(self.single)] if len(rows)]
        if self.means:
            own, first = [rows.lists[feature] for feature, _ in self.means], len(self.single)
            value_VD = torch.cat(value[first : first + len(own)]) if len(own) > 1 else value[first]
            mean_KD = means(value_VD, torch.cat([each.length_R for each in own]))
            pooled += [
                each.of_rows(x) for each, x in zip(own, mean_KD.split([len(e.length_R) for e in own]), strict=True)
            ]
        items = [
            rows.lists[feature].of_rows(padded(value_VD, rows.lists[feature].length_R, self.longest))
            for (feature, _), value_VD in zip(self.sequences, value[len(row) - len(self.sequences) :], strict=True)
        ]
        return pooled, items

    def _values(self, row_N: np.ndarray) -> Tensor:
        """value_ND; 0 where there is no row."""
        if not self.absent or (present_N := row_N != kept_rows.ABSENT).all():
            return looked_up(self.byte_RW, torch.from_numpy(row_N), self.form)
        value_ND = looked_up(self.byte_RW, torch.from_numpy(np.maximum(row_N, 0)), self.form)
        return value_ND.mul_(torch.from_numpy(present_N).unsqueeze(1))


def means(value_VD: Tensor, length_K: Tensor) -> Tensor:
    """mean_KD of lists that lie one after the other; 0 for an empty one."""
    if not len(value_VD):
        return value_VD.new_zeros(len(length_K), value_VD.shape[1])
    offset_K = torch.nn.functional.pad(length_K.cumsum(0), (1, 0))
    place_V = torch.arange(len(value_VD))
    sum_KD = torch.embedding_bag(value_VD, place_V, offset_K, False, 0, False, None, True)[0]
    return sum_KD / length_K.clamp(min=1).unsqueeze(1)


def padded(value_VD: Tensor, length_K: Tensor, longest: int) -> Tensor:
    """item_K(LD): the first L rows of each list, then zeros."""
    list_V = torch.arange(len(length_K)).repeat_interleave(length_K)
    place_V = torch.arange(len(value_VD)) - (length_K.cumsum(0) - length_K)[list_V]
    if bool((place_V >= longest).any()):
        within_V = place_V < longest
        value_VD, list_V, place_V = value_VD[within_V], list_V[within_V], place_V[within_V]
    item_ND = value_VD.new_zeros(len(length_K) * longest, value_VD.shape[1])
    return item_ND.index_copy_(0, list_V * longest + place_V, value_VD).view(len(length_K), -1)


class Tables:
    """The tables of a package. Open them with `Tables.open`; any number of threads may look up at a time.

    Attributes:
        width: E.
    """

    def __init__(self, files: Sequence[File], layout: Layout) -> None:
        self.files, self.layout, self.width = files, layout, layout.width

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, *deltas: Source | None) -> "Tables":
        """Maps the files of a package; checksums are not compared (manifest.check_files does that).

        Args:
            deltas: changes of it, each of the package that the one before it makes; None: none. They are taken into memory that
                is this process's own: a page of a file for each row that changed.
        Raises:
            UserError: a manifest that contradicts itself or its files; a delta of another package.
        """
        layout, base, changes = layout_of(folder, manifest), manifest, [delta for delta in deltas if delta]
        for delta in changes:
            check_base(base, *delta)
            base = delta[1].whole()
        return cls(
            [_file([(folder, manifest), *changes], name, file, layout) for name, file in layout.files.items()], layout
        )

    def embed(self, rows: Encoded) -> Tensor:
        """embedding_BE, float32.

        Raises:
            UserError: an id that its table does not have, or rows of another schema.
        """
        if rows.id_BF.shape[1] != len(self.layout.single):
            raise UserError(
                f"rows with {rows.id_BF.shape[1]} ids, the package's tables read {len(self.layout.single)}: they were "
                "encoded by another schema. Use the package's."
            )
        if not len(rows):
            return torch.zeros(0, self.width)
        found = [file.embed(rows) for file in self.files]
        pooled = [value_BP for parts, _ in found for value_BP in parts]
        value_BP = pooled[0] if len(pooled) == 1 else torch.cat([torch.zeros(len(rows), 0), *pooled], 1)
        if self.layout.order_P is not None:
            value_BP = value_BP.index_select(1, self.layout.order_P)
        if not self.layout.sequences:
            return value_BP
        items = [item_BN for _, sequences in found for item_BN in sequences]
        own = [rows.lists[name] for name in self.layout.sequences]
        count_BJ = torch.stack([each.of_rows(each.length_R) for each in own], 1)
        return torch.cat([value_BP, *items, count_BJ.float()], 1)


def _file(sources: Sequence[Source], name: str, found: FileLayout, layout: Layout) -> File:
    """A file of tables and its look-ups. sources: the package, then its deltas."""
    manifest = sources[0][1]
    lookups = manifest.lookups
    column = {feature: place for place, feature in enumerate(layout.single)}
    words = kept_words(manifest, name)
    bits_P2 = np.zeros((0, 2), np.uint64)
    if found.kept:
        bits_P2 = _newest(sources, found.kept, kept_rows.BYTES * found.kept_words).view(np.uint64).reshape(-1, 2)

    def to_rows(places: Sequence[int]) -> ToRows:
        own = [lookups[place] for place in places]
        tables = [manifest.tables[lookup.table] for lookup in own]
        if ids := tables[0].ids:
            byte_N = _newest(sources, ids, 8 * (tables[0].num_embeddings - FIRST))
            return id_rows.managed(own, tables[0], id_rows.map_of(tables[0], tensor(byte_N.view(np.int64))))
        if tables[0].kept:
            return id_rows.kept(own, tables, [words[lookup.table] for lookup in own], bits_P2, found.kept_rows)
        return id_rows.whole(own, tables)

    return File(
        byte_RW=_rows(sources, name, found.rows, row_bytes(manifest.format, found.dim)),
        form=manifest.format,
        absent=found.kept is not None,
        single=[
            (_columns([column[lookups[p].feature] for p in block]), to_rows(block)) for block in found.blocks.values()
        ],
        means=[(lookups[place].feature, to_rows([place])) for place in found.means],
        sequences=[(lookups[place].feature, to_rows([place])) for place in found.sequences],
        longest=layout.longest,
    )


def _rows(sources: Sequence[Source], name: str, rows: int, width: int) -> Tensor:
    """byte_RW of a file, with the rows that deltas change after the last one that has it whole."""
    some = [rows_name(name) in manifest.files for _, manifest in sources]
    last = max((at for at, (_, manifest) in enumerate(sources) if name in manifest.files and not some[at]), default=0)
    changes = [sources[at] for at in range(last + 1, len(sources)) if some[at]]
    byte_RW = mapped(*sources[last], name, rows * width, writable=bool(changes)).reshape(rows, width)
    for delta in changes:
        row_N, byte_NW = changed_rows(*delta, name, rows, width)
        byte_RW[row_N] = byte_NW
    return tensor(byte_RW)


def _newest(sources: Sequence[Source], name: str, size: int) -> np.ndarray:
    """The bytes of a file that a delta has whole or not at all."""
    found = [source for source in sources if name in source[1].files] or sources
    return mapped(*found[-1], name, size)


def _columns(places: list[int]) -> slice | np.ndarray:
    """What selects columns; a slice, which copies nothing, where they follow each other."""
    consecutive = places == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[0] + len(places)) if consecutive else np.array(places)
