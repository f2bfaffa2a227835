"""What changed in the tables between the checkpoints of two steps of a run: the tables of a delta."""

# Shapes: N rows of a block, W bytes of one, P words of kept rows.

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from features.errors import UserError
from features.schema.schema import Schema
from models.ranker import Ranker
from pipeline.release.export.tables import (
    FOLDER,
    Kept,
    TablesFile,
    blocks,
    kept_blocks,
    lookups,
    map_blocks,
    map_files,
    stored_tables,
    table_files,
)
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.serving.deltas import check_base, rows_name
from pipeline.serving.manifest import (
    Base,
    Lookup,
    Manifest,
    StoredFile,
    StoredTable,
    TableFormat,
    stored_file,
    write_manifest,
)
from pipeline.storage.files import make_folder


class Changed(NamedTuple):
    """The tables of a delta.

    Attributes:
        tables, lookups: of the manifest, as write_tables gives them. names: of the files that were written.
        before, after: of both packages all files of tables, as if they had been exported whole.
    """

    tables: dict[str, StoredTable]
    lookups: list[Lookup]
    names: list[str]
    before: dict[str, StoredFile]
    after: dict[str, StoredFile]


class Digest:
    """A file's size and checksum, without the file."""

    def __init__(self) -> None:
        self.bytes, self.sha256 = 0, hashlib.sha256()

    def add(self, content: np.ndarray) -> None:
        """Continues the file."""
        self.bytes += content.nbytes
        self.sha256.update(content.data)

    def file(self) -> StoredFile:
        """Of what was added."""
        return StoredFile(bytes=self.bytes, sha256=self.sha256.hexdigest())


def changed_tables(
    run: Run,
    step: int,
    since: int,
    ranker: Ranker,
    schema: Schema,
    form: TableFormat,
    kept: Kept | None,
    folder: Path,
) -> Changed:
    """Writes the rows of tables that differ between the packages of two steps, and the maps of ids that do.

    Both checkpoints are read once, some rows at a time; neither package needs to be there.

    Args:
        run, step, since: the later checkpoint and the earlier one; the caller keeps both from being deleted
            (checkpoint.reading).
        ranker, schema, form, kept: of both packages, as write_tables takes them.
        folder: of the delta.
    Raises:
        UserError: as write_tables, of either checkpoint.
    """
    old, new = (checkpoint.folder(run.checkpoints, number) for number in (since, step))
    files, maps = table_files(ranker, schema, kept), map_files(ranker, schema)
    make_folder(folder / FOLDER)
    found = Changed(stored_tables(files, maps), lookups(ranker, schema), [], {}, {})
    for file in files:
        pairs = zip(blocks(old, file, form), blocks(new, file, form), strict=True)
        _write_rows(folder, file, pairs, found)
        if file.kept:
            digest = Digest()
            for bits_P2 in kept_blocks(file):
                digest.add(bits_P2)
            found.before[file.kept] = found.after[file.kept] = digest.file()
    for ids in maps:
        before, after = Digest(), Digest()
        for id_NW in map_blocks(old, ids):
            before.add(id_NW.numpy())
        with (folder / ids.name).open("xb") as opened:
            for id_NW in map_blocks(new, ids):
                after.add(id_NW.numpy())
                opened.write(id_NW.numpy().data)
        found.before[ids.name], found.after[ids.name] = before.file(), after.file()
        found.names.append(ids.name)
    return found


def write_delta_manifest(
    folder: Path,
    whole: Manifest,
    base: Manifest,
    changed: Changed,
    others: Sequence[str],
    known: Mapping[str, StoredFile] | None = None,
) -> Manifest:
    """Writes the manifest of a delta, after all of its files.

    Args:
        folder: of the delta. whole: the manifest of the package that it makes, but for files and checksum.
        base: of the package that it changes, or of a delta that makes that one. changed: the tables. others: names of all other
            files of the package, which the delta has too. known: of files that have not changed since they were read.
    Raises:
        UserError: the base is no export of the earlier step with these settings.
    """
    base = base.whole() if base.base else base
    if unlike := [name for name, file in changed.before.items() if base.files.get(name) != file]:
        raise UserError(
            f"the package of step {base.model.step} has another {unlike[0]} than an export of that step with these settings: "
            "name the one that was exported from it with the same tables=, or export the whole package"
        )
    known = known or {}
    files = changed.after | {name: known.get(name) or stored_file(folder / name) for name in others}
    delta = whole.model_copy(
        update={
            "base": Base(step=base.model.step, checkpoint=base.model.checkpoint, package=base.checksum),
            "result": {name: files[name] for name in sorted(files)},
        }
    )
    check_base(base, folder, delta)
    return write_manifest(folder, delta, [*changed.names, *others], known)


def _write_rows(folder: Path, file: TablesFile, pairs: Iterator[tuple[Tensor, Tensor]], found: Changed) -> None:
    """The rows of a file that differ, and their places; nothing where none does. pairs: byte_NW before and after."""
    before, after, first = Digest(), Digest(), 0
    rows = rows_name(file.name)
    with (folder / rows).open("xb") as places, (folder / file.name).open("xb") as content:
        for old_NW, new_NW in pairs:
            before.add(old_NW.numpy())
            after.add(new_NW.numpy())
            first += _write_changed(old_NW.numpy(), new_NW.numpy(), first, places, content)
        changed = content.tell()
    found.before[file.name], found.after[file.name] = before.file(), after.file()
    if changed:
        found.names.extend([file.name, rows])
    else:
        (folder / rows).unlink()
        (folder / file.name).unlink()


def _write_changed(old_NW: np.ndarray, new_NW: np.ndarray, first: int, places: BinaryIO, content: BinaryIO) -> int:
    """Writes the rows of a block that differ, the first of which is `first` of the file. Returns N."""
    row_N = np.flatnonzero((old_NW != new_NW).any(1))
    places.write((row_N + first).data)
    content.write(new_NW[row_N].data)
    return len(new_NW)
