"""The contender in Polars: lazy queries on the streaming engine, vocabularies looked up by replace_strict."""

from pathlib import Path

import ingest_workload as w
import polars as pl

Moments = dict[str, tuple[float, float]]  # mean and standard deviation by column
Fitted = tuple[dict[str, pl.DataFrame], Moments]  # vocabularies by column: value, id


def fit(log: Path) -> Fitted:
    """Vocabularies and moments; equal parts of queries that are collected together run once, so the log is read once."""
    train = _scan(log).filter(pl.col("event_time") < w.VALID_FROM)
    values = [
        train.group_by(pl.col(name).alias("value")).agg(pl.len().alias("count"))
        .filter(pl.col("value").is_not_null() & (pl.col("count") >= w.MIN_COUNT))
        .sort("count", "value", descending=[True, False])
        .select("value", pl.int_range(pl.len(), dtype=pl.Int64).add(w.UNKNOWN + 1).alias("id"))
        for name in w.IDS
    ]  # fmt: skip
    logs = pl.col(w.NUMBERS).log1p()
    moments = train.select(logs.mean().name.suffix(" mean"), logs.std(ddof=0).name.suffix(" std"))
    *found, sums = pl.collect_all([*values, moments], engine="streaming")
    row = sums.row(0, named=True)
    return dict(zip(w.IDS, found, strict=True)), {n: (row[f"{n} mean"], row[f"{n} std"]) for n in w.NUMBERS}


def _scan(log: Path) -> pl.LazyFrame:
    kinds = {"int64": pl.Int64, "double": pl.Float64, "string": pl.String}
    return pl.scan_csv(log / w.IMPRESSIONS, schema={name: kinds[str(kind)] for name, kind in w.TYPES.items()})


def encode(log: Path, out: Path, fitted: Fitted) -> None:
    """Writes what Polars makes of three splits."""
    vocabularies, moments = fitted
    time = pl.col("event_time")
    rows = _scan(log).select(
        *(((pl.col(n).log1p() - mean) / std).fill_null(0).cast(pl.Float32) for n, (mean, std) in moments.items()),
        *(_id(name, vocabulary) for name, vocabulary in vocabularies.items()),
        pl.col("click").cast(pl.Float32).alias("label.click"),
        pl.lit(1, pl.Float32).alias("weight"),
        time,
        pl.col("impression_id").alias("row_id"),
        pl.when(time < w.VALID_FROM).then(pl.lit("train"))
        .when(time < w.TEST_FROM).then(pl.lit("valid")).otherwise(pl.lit("test")).alias("split"),
    )  # fmt: skip
    target = pl.PartitionBy(out, key="split", include_key=False)
    rows.sink_parquet(target, compression="zstd", row_group_size=w.ROW_GROUP, mkdir=True, engine="streaming")


def _id(name: str, vocabulary: pl.DataFrame) -> pl.Expr:
    known = pl.col(name).replace_strict(vocabulary["value"], vocabulary["id"], default=w.UNKNOWN, return_dtype=pl.Int64)
    return pl.when(pl.col(name).is_null()).then(0).otherwise(known).alias(name)
