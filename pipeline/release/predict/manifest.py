"""What a folder of predictions says of itself: its files, the model that made them, and where every raw row went."""

from importlib import metadata

from pydantic import BaseModel

from features.plain_json import Count
from features.regular_files import RelativePath
from pipeline.dataset.entries import DeadLetterExample, DeadLetterFile, Digest

VERSION = 1


class Model(BaseModel):
    """The model that made predictions; the metadata of each file has the same.

    Attributes:
        run: its folder. step, checkpoint: the step, and the checksum of the checkpoint's manifest.
        fingerprint: of the schema. encoders: what identifies the fitted encoders. taskfuse: the release that scored.
    """

    run: str
    step: int
    checkpoint: str
    fingerprint: str
    encoders: str
    taskfuse: str


class PredictionFile(BaseModel):
    """One Parquet file."""

    path: RelativePath
    rows: Count
    bytes: Count
    sha256: Digest


class Predictions(BaseModel):
    """manifest.json of a folder of predictions.

    Attributes:
        columns: of the files, in order.
        rows: that were scored: `read` of the impressions without their dead letters.
        read: rows found in the raw files, by stream: impressions, or a side table.
        dead_letters: bad rows of all streams by reason. dead_letter_files: those that hold them.
        dead_letter_examples: the first bad row of each of the most frequent reasons.
    """

    version: int = VERSION
    model: Model
    columns: list[str]
    rows: Count
    read: dict[str, Count]
    dead_letters: dict[str, Count]
    dead_letter_files: list[DeadLetterFile]
    dead_letter_examples: dict[str, DeadLetterExample]
    files: list[PredictionFile]


def release() -> str:
    """The installed release of taskfuse; empty where it runs without being installed."""
    try:
        return metadata.version("taskfuse")
    except metadata.PackageNotFoundError:
        return ""
