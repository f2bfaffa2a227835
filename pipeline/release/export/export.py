"""A checkpoint as a package: checked, written beside its place, measured, and committed in one step.

A package on a store is written and measured on this machine first, since what scores maps its files.
"""

import logging
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import torch
from tabulate import tabulate

from features.errors import UserError, one_line
from features.fit.fitted_files import encoder_files
from features.printable import printable
from features.regular_files import read_regular
from features.yaml_text import MAX_BYTES
from pipeline import cores
from pipeline.dataset.dataset import Dataset, encoders_id
from pipeline.evaluation.follow import EvaluateConfig, dataset_of
from pipeline.evaluation.weights import load_dense
from pipeline.release.export.config import Chain, ExportConfig, Source, archive_path, base_of, check_out, source_of
from pipeline.release.export.delta import changed_tables, write_delta_manifest
from pipeline.release.export.model_card import metrics_of, model_card, records_of
from pipeline.release.export.program import check_compiler, write_program
from pipeline.release.export.tables import Kept, occurring_rows, write_tables
from pipeline.release.export.tolerances import checked_split, measured
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.headline import HEADLINE
from pipeline.serving.manifest import (
    ENCODERS,
    FILE,
    MODEL_CARD,
    SCHEMA,
    Manifest,
    Model,
    StoredFile,
    write_manifest,
)
from pipeline.serving.program import compiled_for, load_program
from pipeline.serving.scorer import Scorer
from pipeline.storage.files import copy_file, make_folder, sha256, storage_of
from pipeline.storage.local import fsync, fsync_all
from pipeline.storage.staging import remove_left, staging_of
from pipeline.storage.store_path import on_store
from pipeline.storage.uploading import uploading

FILES = 4  # that are put on a store at a time; each takes 64 MB of memory
VERSIONS = ("taskfuse", "torch", "polars", "pyarrow")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        manifest: of the package, or of the delta. bytes: of all files. split: whose rows were scored. archive: its file.
    """

    path: Path
    manifest: Manifest
    bytes: int
    split: str
    archive: Path | None


def export(config: ExportConfig) -> Exported:
    """Writes the package of a checkpoint, or what it changes in an earlier one. Raises UserError: bad input."""
    torch.set_num_threads(config.threads or cores.available())
    archive = check_out(config)
    check_compiler(config.target == "aot")
    source = source_of(config)
    dataset = dataset_for(config, source)
    split, base = checked_split(dataset), base_of(config, source)
    with ExitStack() as stack:
        trained = stack.enter_context(checkpoint.reading(source.path))
        if source.checksum is not None and trained.checksum != source.checksum:
            raise UserError(f"{source.path} was trained anew after it was released. Export again, or set run=RUN.")
        if config.since is not None:
            stack.enter_context(checkpoint.reading(Source(source.run, config.since).path))
        try:
            manifest = write_package(config, source, dataset, trained, base)
        except OSError as error:
            raise UserError(
                f"{config.out} cannot be written: {one_line(error)}. Make room, or choose another out=."
            ) from None
    size = sum(file.bytes for file in manifest.files.values()) + (config.out / FILE).stat().st_size
    return Exported(config.out, manifest, size, split, archive)


def write_package(
    config: ExportConfig, source: Source, dataset: Dataset, trained: CheckpointManifest, base: Chain | None
) -> Manifest:
    """Writes a package, and its archive, and commits both. Raises UserError, OSError: nothing is left."""
    place = archive_path(config)
    remove_left(place)
    if on_store(config.out):
        return _put_package(config, source, dataset, trained, base)
    with ExitStack() as stack:
        staging = stack.enter_context(staging_of(config.out))
        manifest = Package(config, source, dataset, trained, staging, base).write()
        if config.archive:
            archive = stack.enter_context(staging_of(place)) / place.name
            with archive.open("xb") as opened:
                write_archive(staging, config.out.name, opened)
            fsync(archive)
        fsync_all(staging)
        check_out(config)  # another export may have been faster
        if config.archive:
            place.unlink(missing_ok=True)  # a kill from here on leaves none, rather than that of another package
        storage_of(config.out).commit(staging, config.out)
        if config.archive:
            archive.replace(place)
            fsync(place.parent)
    return manifest


def _put_package(
    config: ExportConfig, source: Source, dataset: Dataset, trained: CheckpointManifest, base: Chain | None
) -> Manifest:
    """As `write_package`, of a package on a store; it takes its bytes in the folder of temporary files meanwhile."""
    place = archive_path(config)
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="taskfuse-export-"))
        folder = make_folder(Path(temporary) / config.out.name)
        manifest = Package(config, source, dataset, trained, folder, base).write()
        check_out(config)
        staging = stack.enter_context(staging_of(config.out))
        with ThreadPoolExecutor(FILES) as pool:
            list(pool.map(lambda name: copy_file(folder / name, staging / name), (*manifest.files, FILE)))
        if config.archive:
            archive = stack.enter_context(staging_of(place)) / place.name
            with uploading(archive) as opened:
                write_archive(folder, config.out.name, opened)
        check_out(config)  # another export may have been faster
        if config.archive:
            place.unlink(missing_ok=True)
        storage_of(config.out).commit(staging, config.out)
        if config.archive:
            copy_file(archive, place)  # within the store
    return manifest


def dataset_for(config: ExportConfig, source: Source) -> Dataset:
    """The dataset whose encoders the package has. Raises UserError where it is not one of the run's schema."""
    given = {
        "run": source.run.path,
        "dataset": config.dataset,
        "days": config.days,
        "missing_days": config.missing_days,
    }
    dataset = dataset_of(source.run, EvaluateConfig.model_validate(given)).only(source.run.config().get("tasks"))
    dataset.check_compatible(source.run.schema().fingerprint, f"the run {source.run.path}")
    return dataset


class Package:
    """The files of a package in a staging folder.

    Args:
        dataset: of the run's tasks. trained: the checkpoint's manifest. folder: where they are written.
        base: what a delta changes (base_of).
    """

    def __init__(
        self, config: ExportConfig, source: Source, dataset: Dataset, trained: CheckpointManifest, folder: Path,
        base: Chain | None,
    ) -> None:  # fmt: skip
        self.config, self.source, self.dataset, self.trained = config, source, dataset, trained
        self.folder, self.base = folder, base

    def write(self) -> Manifest:
        """Writes all files, the manifest last, after a comparison with the checkpoint. Raises UserError."""
        config, source, schema = self.config, self.source, self.dataset.schema
        ranker = load_dense(source.run, source.step, self.dataset)
        kept = occurring_rows(self.dataset) if config.rows == "occurring" else None
        if self.base is None:
            tables, lookups, names = write_tables(
                source.run, source.step, ranker, schema, config.tables, kept, self.folder
            )
        else:
            since = self.base[-1][1].model.step
            changed = changed_tables(source.run, source.step, since, ranker, schema, config.tables, kept, self.folder)
            tables, lookups, names = changed.tables, changed.lookups, []
        names += self._encoders_and_schema()
        compiled = config.target == "aot"
        whole = Manifest(
            model=self._model(), versions=versions(compiled),
            tasks={name: task.kind for name, task in schema.tasks.items()}, format=config.tables, tables=tables,
            lookups=lookups, sets=ranker.sets, dense_width=schema.dense_width, compiled=compiled,
            metrics=metrics_of(records_of(source.run, self.trained, self.dataset.name)),
        )  # fmt: skip
        names += write_program(ranker, whole.embedding_dim, schema.dense_width, self.folder, compiled)

        def sealed(manifest: Manifest, others: list[str], known: dict[str, StoredFile]) -> Manifest:
            if self.base is None:
                return write_manifest(self.folder, manifest, others, known)
            return write_delta_manifest(self.folder, manifest, self.base[-1][1], changed, others, known)

        first = sealed(whole, names, {})  # so that it can be loaded
        whole = whole.model_copy(update={"tolerances": self._measured(first, kept)})
        card = model_card(source.run, self.trained, self.dataset, whole)
        (self.folder / MODEL_CARD).write_text(card, encoding="utf-8")
        return sealed(whole, [*names, MODEL_CARD], first.files)

    def _measured(self, manifest: Manifest, kept: Kept | None) -> dict[str, float]:
        """Differences of the package to the checkpoint. Raises UserError where they are more than its format explains."""
        bases = [folder for folder, _ in self.base or []]
        scorer = Scorer.load(self.folder, check=False, base=bases)
        compiled = load_program(self.folder, manifest, compiled=True) if manifest.compiled else None
        return measured(self.source, self.dataset, scorer, self.config.check_rows, kept, compiled)

    def _model(self) -> Model:
        return Model(
            run=str(self.source.run.path.absolute()), step=self.source.step, checkpoint=self.trained.checksum,
            fingerprint=self.trained.fingerprint, encoders=self.trained.encoders,
        )  # fmt: skip

    def _encoders_and_schema(self) -> list[str]:
        """Copies both. Raises UserError where the copies are not those that the run was trained with."""
        (self.folder / SCHEMA).write_bytes(read_regular(self.source.run.path, SCHEMA, MAX_BYTES))
        names = [f"{ENCODERS}/{name}" for name in encoder_files(self.dataset.schema)]
        checksums = []
        for name in names:
            copy = self.folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_file(self.dataset.encoded_by / name, copy)
            checksums.append(sha256(copy))
        if encoders_id(checksums) != self.trained.encoders:
            raise UserError(f"{self.dataset.encoded_by}/{ENCODERS} changed while it was copied. Export again.")
        return [SCHEMA, *names]


def versions(compiled: bool) -> dict[str, str]:
    """Of the libraries that a package is made with, and of what a compiled program is for."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its sources
            continue
    return found | (compiled_for() if compiled else {})


def write_archive(folder: Path, name: str, file: BinaryIO) -> None:
    """A tar of a package below the folder `name`, the same bytes whenever its files are: sorted, without owners and times."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # never seeks: a store cannot
        archive.add(folder, name, recursive=False, filter=plain)
        for path in sorted(folder.rglob("*")):
            archive.add(path, f"{name}/{path.relative_to(folder)}", recursive=False, filter=plain)


def report(found: Exported) -> str:
    """What was written, for a terminal: a line a task with its headline metric by checkpoint and package, then the rest."""
    manifest, measured = found.manifest, found.manifest.tolerances
    lines = []
    for task, kind in manifest.tasks.items():
        values = [measured.get(f"{HEADLINE[kind]}.{task}.{owner}") for owner in ("checkpoint", "package")]
        lines.append([printable(task), HEADLINE[kind].upper(), *("-" if v is None else f"{v:.6f}" for v in values)])
    table = tabulate(lines, ["task", "metric", "checkpoint", "package"], disable_numparse=True)
    what = f"what changed since step {manifest.base.step:,}" if manifest.base else "the package"
    archive = f"\n{found.archive}" if found.archive else ""
    compiled = measured.get("compiled.max_relative_difference")
    programs = (
        "" if compiled is None else f"; of the compiled program's from the portable one's {compiled:.3g} of 1 + |logit|"
    )
    return (
        f"step {manifest.model.step:,} of {printable(manifest.model.run)}: {what}, {found.bytes / 1e6:,.1f} MB, tables in "
        f"{manifest.format}\n\n{table}\n\nlargest difference of a logit {measured['max_logit_difference']:.3g}, on "
        f"{measured['rows']:,.0f} rows of split {found.split}{programs}\n\n{found.path}{archive}"
    )
