"""Settings of jobs.export, and which checkpoint they mean."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from features.errors import UserError
from pipeline.dataset.days import Days, MissingDays
from pipeline.release.serving import FILE, check_there, read_serving
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.serving.deltas import bases_of
from pipeline.serving.manifest import Manifest, TableFormat, read_manifest
from pipeline.storage.staging import is_staging, recover
from pipeline.storage.store_path import Place, place

Chain = list[tuple[Path, Manifest]]  # a whole package, then deltas, each of what those before it make


class ExportConfig(BaseModel):
    """Settings of jobs.export; see jobs/conf/export.yaml.

    Attributes:
        run, step: of the checkpoint. serving: a folder of nights instead, whose serving.json names it.
        out: folder of the package; on a store it takes its bytes in the folder of temporary files (TMPDIR) first.
        overwrite: replace the one that is there. archive: write OUT.tar too.
        tables: format of the tables' rows. rows: all rows, or only those of ids that occur in the train split.
        target: "aot" writes a compiled program beside the portable one.
        since: step of an earlier checkpoint: only what changed since is written. base: the package of that step; None: the
            one that lies beside `out`. It may be a delta itself, whose own base lies beside `out`.
        dataset, days, missing_days: as jobs.evaluate has them; its encoders must be those the run was trained with.
        check_rows: how many rows of the valid split (else test, else train) are scored by both to measure differences.
        threads: None: all cores.
    """

    model_config = ConfigDict(extra="forbid")
    run: Place | None = None
    serving: Place | None = None
    out: Place
    step: int | Literal["newest"] = "newest"
    tables: TableFormat = "fp32"
    rows: Literal["all", "occurring"] = "all"
    target: Literal["eager", "aot"] = "eager"
    archive: bool = False
    overwrite: bool = False
    since: int | None = Field(None, ge=0)
    base: Place | None = None
    dataset: Place | None = None
    days: Days = None
    missing_days: MissingDays | None = None
    check_rows: int = Field(8192, ge=1, le=1 << 20)
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _names_one_checkpoint(self) -> "ExportConfig":
        if (self.run is None) == (self.serving is None):
            raise ValueError("set run=RUN, or serving=OUT of jobs.nightly, and not both")
        if self.serving is not None and self.step != "newest":
            raise ValueError("serving.json names the step: leave step out, or set run=RUN")
        if self.base is not None and self.since is None:
            raise ValueError("base is the package of step `since`: set since=STEP too")
        return self


class Source(NamedTuple):
    """A checkpoint of a run. checksum: that it must have; None: any."""

    run: Run
    step: int
    checksum: str | None = None

    @property
    def path(self) -> Path:
        """Its folder."""
        return checkpoint.folder(self.run.checkpoints, self.step)


def source_of(config: ExportConfig) -> Source:
    """The checkpoint that is exported. Raises UserError where there is none."""
    if config.serving is not None:
        pointer = read_serving(config.serving)
        if pointer is None:
            raise UserError(f"{config.serving / FILE} is missing: no night has released a checkpoint yet. Set run=RUN.")
        check_there(pointer, config.serving)
        return Source(Run(place(pointer.run)), pointer.step, pointer.checksum)
    assert config.run is not None
    run = Run(config.run)
    run.config()
    return Source(run, checkpoint.chosen(run.checkpoints, config.step))


def archive_path(config: ExportConfig) -> Path:
    """Where an archive of the package lies."""
    return config.out.with_name(f"{config.out.name}.tar")


def check_out(config: ExportConfig) -> Path | None:
    """The place of the archive, if one is wanted. Raises UserError where something stands in the way."""
    recover(config.out)
    archive = archive_path(config) if config.archive else None
    for path in (config.out, archive):
        if path is not None and path.is_symlink():
            raise UserError(f"{path} is a link, which is not followed. Choose another out=.")
        if path is not None and path.exists() and not config.overwrite:
            raise UserError(f"{path} is there already. Choose another out=, or set overwrite=true.")
    if archive is None and config.out.exists() and archive_path(config).exists():
        raise UserError(
            f"{archive_path(config)} is of the package that is replaced. Set archive=true to replace it too, or remove it."
        )
    if config.out.exists() and (not config.out.is_dir() or not (config.out / "manifest.json").is_file()):
        raise UserError(f"{config.out} is no package, and is not replaced. Choose another out=.")
    return archive


def base_of(config: ExportConfig, source: Source) -> Chain | None:
    """The package that a delta changes, and what that one changes if it is a delta itself, the whole package first.

    Returns: None where a whole package is wanted.
    Raises:
        UserError: it is not there, or it is what `out` is to replace.
    """
    if config.since is None:
        return None
    if config.since >= source.step:
        raise UserError(f"since={config.since}: is not before step {source.step}. Name an earlier checkpoint.")
    earlier = checkpoint.read(Source(source.run, config.since).path).checksum
    found = _packages_beside(config.out)
    if config.base is not None:
        found[config.base] = read_manifest(config.base)
    where = str(config.base) if config.base else f"beside {config.out}"
    why = (
        f"no package of that step with tables={config.tables} rows={config.rows} ({where}), or it is a delta whose own base is "
        "not there. Export it, or set base=PACKAGE."
    )
    for folder in found if config.base is None else [config.base]:
        manifest = found[folder]
        if manifest.model.checkpoint != earlier or not _has_settings(manifest, config):
            continue
        chain = _chain(folder, found)
        if chain is None:
            continue
        if any(part.resolve() == config.out.resolve() for part, _ in chain):
            why = f"{config.out} is the package that this delta changes. Choose another out=."
        elif manifest.compiled and config.target == "eager":
            why = f"{folder} has a compiled program. Set target=aot here too."
        else:
            return chain
    raise UserError(f"since={config.since}: {why}")


def _packages_beside(out: Path) -> dict[Path, Manifest]:
    """Folders of packages and deltas in the folder of `out`, in order of their names, without those that are being written."""
    found = {}
    for file in sorted(out.absolute().parent.glob("*/manifest.json")):
        if not is_staging(file.parent):
            with suppress(UserError):
                found[file.parent] = read_manifest(file.parent)
    return found


def _has_settings(manifest: Manifest, config: ExportConfig) -> bool:
    """Whether a package's tables are as an export with these settings would write them; managed ones are always whole."""
    kept = config.rows == "occurring"
    return manifest.format == config.tables and all(
        (table.kept is not None) == (kept and table.ids is None) for table in manifest.tables.values()
    )


def _chain(folder: Path, found: Mapping[Path, Manifest]) -> Chain | None:
    """A package after all that it changes, the whole one first; None where one of them is not among those found."""
    makes = {place: (manifest.whole() if manifest.base else manifest).checksum for place, manifest in found.items()}
    bases = bases_of(folder, found, makes)
    return None if bases is None else [(place, found[place]) for place in (*bases, folder)]
