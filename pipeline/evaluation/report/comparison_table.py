"""Two evaluations of the same rows side by side in a terminal, with paired intervals."""

from collections.abc import Mapping, Sequence

import polars as pl
from tabulate import tabulate

from features.errors import UserError
from features.printable import printable
from pipeline.evaluation.metrics.evaluated import ALL, Evaluated, paired
from pipeline.evaluation.metrics.intervals import quantile
from pipeline.evaluation.metrics.registry import COLUMNS, METRICS
from pipeline.evaluation.metrics.slice_names import covers
from pipeline.run.headline import HEADLINE

CONFIDENCE = 0.95


def differences(
    ours: Evaluated, theirs: Evaluated, kinds: Mapping[str, str], slices: int | Sequence[str] = 10
) -> pl.DataFrame:
    """The lines of `table`: those of `paired`, with half of the two-sided interval of delta and of relative, and `differs`.

    Relative is null where theirs is not above 0.

    Args:
        kinds: task → kind, of ours. slices: patterns or dimensions; or how many: those whose headline metric differs most in
            standard errors, most first.
    Raises:
        UserError: as `paired`; or they have no task in common.
    """
    shown = [(task, metric) for task, kind in kinds.items() for metric in COLUMNS[kind]]
    wanted = pl.DataFrame(shown, schema={"task": pl.String, "metric": pl.String}, orient="row")
    chosen = Evaluated(wanted.join(ours.figures, on=["task", "metric"], maintain_order="left_right"), ours.provenance)
    if not set(chosen.figures["task"]) & set(theirs.figures["task"]):
        raise UserError(f"{ours.provenance.run} and {theirs.provenance.run} have no task in common")
    lines = paired(chosen, theirs)
    reach = pl.Series(quantile(CONFIDENCE, lines["buckets"].to_numpy())).fill_nan(None)
    lines = lines.with_columns(half=pl.col("se") * reach, relative_half=pl.col("relative_se") * reach)
    # A share of a figure that may be negative, as R2, has no direction.
    positive = pl.when(pl.col("theirs") > 0)
    lines = lines.with_columns(relative=positive.then("relative"), relative_half=positive.then("relative_half"))
    lines = lines.with_columns(differs=(pl.col("delta").abs() > pl.col("half")).fill_null(False))
    whole, parts = lines.filter(slice=ALL), lines.filter(pl.col("slice") != ALL)
    if isinstance(slices, int):
        parts = parts.filter(pl.col("metric").is_in(HEADLINE.values()) & (pl.col("se") > 0))
        most = (pl.col("delta") / pl.col("se")).abs()
        return pl.concat([whole, parts.sort(most, descending=True, nulls_last=True, maintain_order=True).head(slices)])
    kept = [covers(slices, *of) for of in parts.select("dimension", "slice").iter_rows()]
    return pl.concat([whole, parts.filter(pl.Series(kept, dtype=pl.Boolean))])


def table(
    ours: Evaluated,
    theirs: Evaluated,
    kinds: Mapping[str, str],
    slices: int | Sequence[str] = 10,
    style: str = "simple",
) -> str:
    """What is compared, a line for each difference, and what the mark means. Args and errors: as `differences`; of tabulate."""
    lines = differences(ours, theirs, kinds, slices)
    header = ["task", "metric", "slice", "rows", "ours", "theirs", "delta ± 95%", "relative ± 95%", ""]
    cells = [
        [
            printable(line["task"]), METRICS[kinds[line["task"]]][line["metric"]].label, printable(line["slice"]),
            f"{line['rows']:,}", _number(line["ours"]), _number(line["theirs"]),
            _change(line["delta"], line["half"], "+.5f"), _change(line["relative"], line["relative_half"], "+.2%"),
            "*" if line["differs"] else "",
        ]
        for line in lines.iter_rows(named=True)
    ]  # fmt: skip
    align = ("left", "left", "left", "right", "right", "right", "right", "right", "left")
    source = ours.provenance
    rows = f"{source.split} split of {source.dataset}" + (
        f", {source.share:.3g} of its clusters" if source.share < 1 else ""
    )
    compared = [
        f"{name}: {x.provenance.run} step {x.provenance.step:,}" for name, x in (("ours", ours), ("theirs", theirs))
    ]
    return "\n".join(
        [
            *map(printable, compared),
            printable(f"{rows}; intervals from {source.buckets} buckets, clustered by {source.cluster}"),
            "",
            tabulate(cells, header, tablefmt=style, disable_numparse=True, colalign=align if cells else None),
            "",
            "* the 95% interval of delta excludes 0, as it does for about 1 in 20 slices of two equally good models",
        ]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _change(value: float | None, half: float | None, form: str) -> str:
    """A change and half its interval; both - where unknown."""
    if value is None:
        return "-"
    return f"{value:{form}} ± {'-' if half is None else format(half, form[1:])}"
