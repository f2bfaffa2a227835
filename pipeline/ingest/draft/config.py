"""Settings of jobs.draft."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator


class DraftConfig(BaseModel):
    """Settings of jobs.draft; what is None is found in the files.

    Attributes:
        input: folder of the raw files, on any file system that fsspec knows.
        out: the file to write: DIR/data/NAME.yaml, so that --config-dir=DIR data=NAME reads it.
        files: patterns of the files of each stream, as `source.files` of a schema; a text with commas is several.
        impressions: the one of the patterns that are the impressions.
        label: a column of the impressions, or a SQL expression over them.
        key: column of the impressions that outcomes refer to.
        event_time: column of the impressions.
        overwrite: replace the file.
    """

    model_config = ConfigDict(extra="forbid")
    input: str
    out: Path
    files: list[str] | None = Field(None, min_length=1)
    impressions: str | None = None
    label: str | None = None
    key: str | None = None
    event_time: str | None = None
    overwrite: bool = False

    @field_validator("files", mode="before")
    @classmethod
    def _listed(cls, files: object) -> object:
        return [part.strip() for part in files.split(",")] if isinstance(files, str) else files
