"""All figures of a checkpoint on a split by task, metric and slice, with what intervals need: a Parquet file."""

# Shapes: K buckets.

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

from features.errors import UserError, one_line
from features.parquet_limits import check_file
from features.plain_json import first_fault
from features.regular_files import lstat_regular
from pipeline.evaluation.metrics.intervals import buckets_used, left_out, quantile, standard_error
from pipeline.run.run import Run, config_hash
from pipeline.storage.files import make_folder, whole
from pipeline.storage.patience import cure_of
from pipeline.storage.uploading import uploading

ALL = "all"  # the slice of all rows
COLUMNS: dict[Any, Any] = {
    "task": pl.String,
    "metric": pl.String,
    "dimension": pl.String,
    "slice": pl.String,
    "rows": pl.Int64,
    "value": pl.Float64,
    "se": pl.Float64,
    "left_out": pl.List(pl.Float64),
}


class Provenance(BaseModel):
    """Which rows were scored with what; the metadata of the file.

    Attributes:
        checkpoint: checksum of its manifest. dataset: see Dataset.name.
        share: of the split that was scored. share_by: the key whose values were all scored or not at all; empty where all were.
        cluster: the key that rows are put into buckets by: a column, or row. buckets: K.
        kept: share of the clusters that ranking metrics, or their intervals, are of (see Grouping).
        measure: see Scorer.measured; files of early versions have none. min_rows: of a slice; 100 in those of early versions.
    """

    run: str
    step: int
    checkpoint: str
    dataset: str
    split: str
    share: float = Field(1.0, gt=0, le=1)
    share_by: str = ""
    cluster: str = "row"
    buckets: int = Field(1, ge=1)
    kept: float = Field(1.0, gt=0, le=1)
    measure: str = ""
    min_rows: int = Field(100, ge=1)

    def same_rows(self, other: "Provenance") -> bool:
        """Whether two evaluations are of the same rows in the same buckets, kept alike, so that they can be paired."""
        keys = ("dataset", "split", "share", "share_by", "cluster", "buckets", "kept")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


@dataclass(frozen=True)
class Evaluated:
    """Figures of one checkpoint.

    Attributes:
        figures: a line for each task, metric and slice, with COLUMNS: `dimension` is what the slice is a value of ("all" of
            the slice "all"), `rows` those of the slice that count for the task, `value` null where undefined, `se` its
            standard error, `left_out` the K values without each bucket, null for a bucket without rows of the slice, all null
            where no error can be told (`intervals.left_out`); an empty list where the metric has no intervals.
    """

    figures: pl.DataFrame
    provenance: Provenance

    def value(self, task: str, metric: str, of_slice: str = ALL) -> float | None:
        """One figure; None where it is undefined. Raises KeyError where there is no such line."""
        found = self.figures.filter(task=task, metric=metric, slice=of_slice)
        if not found.height:
            raise KeyError((task, metric, of_slice))
        return found["value"][0]


def with_intervals(figures: pl.DataFrame, confidence: float = 0.95) -> pl.DataFrame:
    """`figures` with `low` and `high`, the ends of the two-sided interval; null where there is none."""
    used = np.array([buckets_used(as_array(x)) for x in figures["left_out"]], np.int64)
    reach = pl.Series(quantile(confidence, used) * figures["se"].fill_null(np.nan).to_numpy()).fill_nan(None)
    return figures.with_columns(low=pl.col("value") - reach, high=pl.col("value") + reach)


def paired(ours: Evaluated, theirs: Evaluated) -> pl.DataFrame:
    """The differences of two evaluations of the same rows, ours - theirs, with standard errors paired by bucket.

    Returns: a line for each task, metric and slice that both have: task, metric, dimension, slice, rows, ours, theirs, delta,
        se, relative (delta / theirs: infinite where theirs is 0, of the other sign where it is negative), relative_se,
        buckets (that have rows: the degrees of freedom are one fewer).
    Raises:
        UserError: they are not of the same rows in the same buckets.
    """
    if not ours.provenance.same_rows(theirs.provenance):
        raise UserError(
            f"{ours.provenance.run} step {ours.provenance.step} and {theirs.provenance.run} step {theirs.provenance.step} were "
            "not evaluated on the same rows (dataset, split, share, share_by, cluster, buckets, and the share of clusters that "
            "memory holds): evaluate both with the same settings"
        )
    keys = ["task", "metric", "dimension", "slice"]
    both = ours.figures.join(
        theirs.figures.select(*keys, "value", "left_out"), on=keys, suffix="_theirs", maintain_order="left"
    )
    deltas, ratios, used = [], [], []
    for a, b in zip(both["left_out"], both["left_out_theirs"], strict=True):
        a_K, b_K = as_array(a), as_array(b)
        if len(a_K) != len(b_K):  # one of them is undefined
            a_K = b_K = np.zeros(0)
        deltas.append(float(standard_error(a_K - b_K)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(float(standard_error(left_out(a_K / b_K - 1, np.isfinite(a_K - b_K)))))
        used.append(int(buckets_used(a_K - b_K)))
    delta = pl.col("value") - pl.col("value_theirs")
    return both.select(
        "task", "metric", "dimension", "slice", "rows", pl.col("value").alias("ours"), pl.col("value_theirs").alias("theirs"),
        delta.alias("delta"), pl.Series("se", deltas, pl.Float64).fill_nan(None),
        (delta / pl.col("value_theirs")).alias("relative"),
        pl.Series("relative_se", ratios, pl.Float64).fill_nan(None), pl.Series("buckets", used, pl.Int64),
    )  # fmt: skip


def as_array(left_out: pl.Series | None) -> np.ndarray:
    """`left_out` of one line as a float64 array of shape (K,), NaN for null."""
    return np.zeros(0) if left_out is None else left_out.cast(pl.Float64).fill_null(np.nan).to_numpy()


def path(run: Run, of: Provenance, own_dataset: bool = True) -> Path:
    """Where an evaluation is kept: RUN/evaluations/SPLIT-STEP.parquet, on other rows with a hash of which."""
    other = "" if own_dataset and of.share == 1 else f"-{config_hash([of.dataset, of.share])[:8]}"
    return run.path / "evaluations" / f"{of.split}-{of.step:08d}{other}.parquet"


def write(evaluated: Evaluated, file: Path) -> None:
    """Writes the file atomically."""
    make_folder(file.parent)
    content = {key: str(value) for key, value in evaluated.provenance.model_dump().items()}
    with uploading(file) as opened:
        evaluated.figures.cast(COLUMNS).write_parquet(opened, metadata=content)


def read(file: Path) -> Evaluated:
    """What `write` wrote. Raises UserError for a file that is missing, damaged or of another form."""
    hint = "Remove it, and its line of eval.jsonl: jobs.evaluate writes it again."
    try:
        if lstat_regular(file.parent, file.name) is None:
            raise UserError(f"{file} is missing. Remove its line of eval.jsonl: jobs.evaluate writes it again.")
        check_file(file)
        figures = pl.read_parquet(source := whole(file), glob=False)
        provenance = Provenance.model_validate(_content(pl.read_parquet_metadata(source)))
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}). {cure_of(error, hint)}") from None
    except ValidationError as error:
        raise UserError(f"{file}: {first_fault(error)}. {hint}") from None
    if dict(figures.schema) != COLUMNS:
        raise UserError(f"{file}: has other columns than {', '.join(COLUMNS)}. {hint}")
    return Evaluated(figures, provenance)


def _content(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key in Provenance.model_fields}
