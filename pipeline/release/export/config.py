"""Settings of jobs.export, and which checkpoint they mean."""

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from features.errors import UserError
from pipeline.dataset.days import Days, MissingDays
from pipeline.release.serving import FILE, check_there, read_serving
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.serving.manifest import Manifest, TableFormat, read_manifest


class ExportConfig(BaseModel):
    """Settings of jobs.export; see jobs/conf/export.yaml.

    Attributes:
        run, step: of the checkpoint. serving: a folder of nights instead, whose serving.json names it.
        out: folder of the package. overwrite: replace the one that is there. archive: write OUT.tar too.
        tables: format of the tables' rows. rows: all rows, or only those of ids that occur in the train split.
        target: "aot" writes a compiled program beside the portable one.
        since: step of an earlier checkpoint: only what changed since is written. base: the package of that step; None: the
            one that lies beside `out`.
        dataset, days, missing_days: as jobs.evaluate has them; its encoders must be those the run was trained with.
        check_rows: how many rows of the valid split (else test, else train) are scored by both to measure differences.
        threads: None: all cores.
    """

    model_config = ConfigDict(extra="forbid")
    run: Path | None = None
    serving: Path | None = None
    out: Path
    step: int | Literal["newest"] = "newest"
    tables: TableFormat = "fp32"
    rows: Literal["all", "occurring"] = "all"
    target: Literal["eager", "aot"] = "eager"
    archive: bool = False
    overwrite: bool = False
    since: int | None = Field(None, ge=0)
    base: Path | None = None
    dataset: Path | None = None
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
    """A checkpoint of a run."""

    run: Run
    step: int

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
        return Source(Run(Path(pointer.run)), pointer.step)
    assert config.run is not None
    run = Run(config.run)
    run.config()
    found = checkpoint.steps(run.checkpoints)
    step = found[-1] if found and config.step == "newest" else config.step
    if not isinstance(step, int) or step not in found:
        what = "any" if config.step == "newest" else f"step {step}"
        raise UserError(f"{run.checkpoints}: no checkpoint ({what}); there are {found or 'none'}")
    return Source(run, step)


def check_out(config: ExportConfig) -> Path | None:
    """The place of the archive, if one is wanted. Raises UserError where something stands in the way."""
    archive = config.out.with_name(f"{config.out.name}.tar") if config.archive else None
    for path in (config.out, archive):
        if path is not None and path.is_symlink():
            raise UserError(f"{path} is a link, which is not followed. Choose another out=.")
        if path is not None and path.exists() and not config.overwrite:
            raise UserError(f"{path} is there already. Choose another out=, or set overwrite=true.")
    if config.out.exists() and (not config.out.is_dir() or not (config.out / "manifest.json").is_file()):
        raise UserError(f"{config.out} is no package, and is not replaced. Choose another out=.")
    return archive


def base_of(config: ExportConfig, source: Source) -> tuple[Path, Manifest] | None:
    """The package that a delta changes; None where a whole package is wanted. Raises UserError where it is not there."""
    if config.since is None:
        return None
    if config.since >= source.step:
        raise UserError(f"since={config.since}: is not before step {source.step}. Name an earlier checkpoint.")
    earlier = checkpoint.read(Source(source.run, config.since).path).checksum
    if config.base is not None:
        folders = [config.base]
    else:
        folders = sorted(file.parent for file in config.out.absolute().parent.glob("*/manifest.json"))
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except UserError:
            if config.base is not None:
                raise
            continue
        if manifest.base is None and manifest.model.checkpoint == earlier and manifest.format == config.tables:
            return folder, manifest
    where = str(config.base) if config.base else f"beside {config.out}"
    raise UserError(
        f"since={config.since}: no package of that step with tables={config.tables} ({where}). Export it, or set base=PACKAGE."
    )
