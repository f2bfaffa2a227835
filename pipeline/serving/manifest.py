"""The manifest of a package: which checkpoint it is made of, how its tables lie in files, and the checksum of every file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from features.errors import UserError
from features.plain_json import Count, read_json, validated
from features.regular_files import lstat_regular
from pipeline.storage.files import sha256, write_json

FILE = "manifest.json"
VERSION = 1
DENSE, COMPILED = "dense.pt2", "compiled.pt2"
MODEL_CARD, SCHEMA, ENCODERS = "model_card.md", "schema.yaml", "encoders"
HINT = "Restore it, or run jobs.export again."

# Of a file, relative to the package.
FileName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}(/[A-Za-z0-9_][A-Za-z0-9_.@-]{0,254}){0,2}$")
]
Text = Annotated[str, Field(max_length=4096)]
TableFormat = Literal["fp32", "fp16", "int8", "int4"]


class Strict(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Model(Strict):
    """The checkpoint: its run, step and checksum, and the schema and encoders it was trained with."""

    run: Text
    step: Count
    checkpoint: Text
    fingerprint: Text
    encoders: Text


class StoredTable(Strict):
    """Where the rows of an embedding table lie.

    Attributes:
        file: of all tables of one width. first: the row of this file with which it begins. rows: how many are stored.
        dim: numbers of a row. num_embeddings: of the model's table: ids are below it.
        kept: where rows are left out, a file that says which ids have one (kept_rows), of all such tables of `file`, which are
            its first ones; None: all have. The embedding of an id without a row is 0.
        ids: of a managed table a file of its map, int64 id_SW (models.id_map); None for other tables.
    """

    file: FileName
    first: Count
    rows: Count
    dim: Annotated[Count, Field(ge=1)]
    num_embeddings: Count
    kept: FileName | None = None
    ids: FileName | None = None


class Lookup(Strict):
    """A part of the embeddings that the dense program reads, in its order.

    Attributes:
        feature: of the schema. table: of `tables`.
        pooling: a row for each id ("single"), the mean of a list ("mean"), or its items, padded to `max_length` ("sequence").
    """

    feature: Text
    table: Text
    pooling: Literal["single", "mean", "sequence"]
    max_length: Count = 0


class StoredFile(Strict):
    """A file's size and sha256."""

    bytes: Count
    sha256: Text


class Base(Strict):
    """The package that a delta is applied to: its checkpoint, and `checksum` of its manifest."""

    step: Count
    checkpoint: Text
    package: Text


class Manifest(Strict):
    """What a package is.

    Attributes:
        version: of the format. versions: of taskfuse, torch and what else it was written with.
        tasks: their kinds, in the order of the program's outputs.
        format: of the tables' rows: float32, float16, or FBGEMM's rows of 8 or 4 bits with their scale and bias.
        tables, lookups, sets: how embedding_BE is made (pipeline.serving.tables); sets: S of models.ranker.
        dense_width: D of dense_BD. compiled: whether there is a COMPILED program beside DENSE.
        metrics: of the checkpoint: per split, task and metric. tolerances: measured differences to the checkpoint, by name.
        files: each with its size and checksum.
        base: of a delta, the package that it changes; None for a whole package. Of a file of tables with a FILE.rows beside
            it, a delta has some rows, their places in the whole file there, ascending int64. Others are whole or its base's.
        result: of a delta, `files` of the package that it makes of its base.
        checksum: of all other fields.
    """

    version: Literal[1] = 1
    model: Model
    versions: dict[str, Text]
    tasks: dict[str, Literal["binary", "regression"]]
    format: TableFormat
    tables: dict[str, StoredTable]
    lookups: list[Lookup]
    sets: Annotated[Count, Field(ge=1)] = 1
    dense_width: Count
    compiled: bool = False
    metrics: dict[str, dict[str, dict[str, FiniteFloat]]] = {}
    tolerances: dict[str, FiniteFloat] = {}
    files: dict[FileName, StoredFile] = {}
    base: Base | None = None
    result: dict[FileName, StoredFile] = {}
    checksum: str = ""

    @property
    def embedding_dim(self) -> int:
        """E of embedding_BE: pooled features, then the items of sequences, padded to the longest, and how many each has."""
        dims = [(part, self.tables[part.table].dim) for part in self.lookups]
        longest = max((part.max_length for part in self.lookups), default=0)
        return sum(longest * dim + 1 if part.pooling == "sequence" else dim for part, dim in dims)

    def whole(self) -> "Manifest":
        """Of a delta, the manifest of the package that it makes of its base."""
        files = {name: self.result[name] for name in sorted(self.result)}
        return self.model_copy(update={"base": None, "result": {}}).sealed(files)

    def sealed(self, files: dict[str, StoredFile]) -> "Manifest":
        """The same with its files and its checksum."""
        content = self.model_copy(update={"files": files}).model_dump(mode="json", exclude={"checksum"})
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.model_copy(update={"files": files, "checksum": digest})


def stored_file(path: Path) -> StoredFile:
    """The size and checksum of a file that was just written."""
    return StoredFile(bytes=path.stat().st_size, sha256=sha256(path))


def write_manifest(
    folder: Path, manifest: Manifest, names: list[str], known: Mapping[str, StoredFile] | None = None
) -> Manifest:
    """Writes the manifest of the files of a folder, last. Returns it with their sizes and checksums, but for those known."""
    known = known or {}
    sealed = manifest.sealed({name: known.get(name) or stored_file(folder / name) for name in sorted(names)})
    write_json(folder / FILE, sealed.model_dump(mode="json"))
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """A package's manifest. Raises UserError if it is missing, damaged or of another version.

    Args:
        folder: or a link to it, which whoever names it trusts; links below it are refused.
    """
    try:
        content = read_json(folder, FILE)
    except FileNotFoundError:
        raise UserError(f"{folder}: no package ({FILE} is missing). Make one with jobs.export.") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(
            f"{folder}: package of version {version}, this release reads {VERSION}. Export it again with this one."
        )
    manifest = validated(Manifest, content, folder / FILE)
    if manifest != manifest.sealed(manifest.files):
        raise UserError(f"{folder / FILE}: its checksum is not its content's: it changed after it was written. {HINT}")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares every file of a package with its manifest. Raises UserError, naming what is missing or differs."""
    for name, expected in sorted(manifest.files.items()):
        file = folder / name
        if (status := lstat_regular(folder, name)) is None:
            raise UserError(f"{file} is missing. {HINT}")
        if status.st_size != expected.bytes:
            raise UserError(f"{file} has {status.st_size} bytes, the manifest says {expected.bytes}. {HINT}")
        if sha256(file) != expected.sha256:
            raise UserError(f"{file}: its checksum is not the manifest's: it changed after it was written. {HINT}")
