"""Coverage of confidence intervals on simulated logs: python tests/benchmarks/intervals.py (make bench-intervals).

Each day is a new log of independent users (tests/simulated_log.py), about 20,000 rows of 2,500 users, scored by three
models: a, b with other errors of the same size, so equally good in the population, and c with larger ones, so that its NE is
0.1% worse. The metrics of the population are those of 2M independent rows (scikit-learn, SciPy and NumPy); GAUC and NDCG those
of 200,000 users.
Printed and kept in results/intervals.json:

  coverage     share of days on which the 95% interval holds the population's metric; 95% is right. By user, by row (wrong,
               since rows of a user are not independent), by the number of buckets, and with a quarter of the users kept for
               ranking metrics. `se / sd`: mean standard error over the standard deviation of the metric over days.
               `bias / sd`: by how much the metric is wrong on average; an interval does not cover that
  differences  share of days on which the interval of a difference leaves out 0: of a and b a false alarm (5% is right), of a
               and c a detection (power); paired by bucket, and as if the two had been scored on different users
  large        the same for NE at 1M rows, and power at other sizes by Student's t, the standard error scaled by 1/sqrt(rows)
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import kendalltau, nct
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from tabulate import tabulate
from train_runs import RESULTS, machine

sys.path.append(str(Path(__file__).parents[1]))
from simulated_log import SLICES, SimulatedLog, evaluated_of, metrics_of, simulate

from pipeline.evaluation.metrics.evaluated import ALL, paired
from pipeline.evaluation.metrics.intervals import buckets_used, quantile, standard_error

# Shapes: N rows, M models.
PLANTED = 0.001  # relative difference of NE of models a and c
CONFIDENCE = 0.95
BUCKETS = 100
ROWS_PER_USER = 8.1
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
KEYS = ["task", "metric", "slice"]
USER, ROW, KEPT = "user", "row", "user, a quarter kept"
METHODS = {
    USER: {"spend": True},
    ROW: {"spend": True, "by_user": False},
    KEPT: {"spend": True, "sliced": False, "halvings": 2},
    **{f"user, {buckets} buckets": {"sliced": False, "buckets": buckets} for buckets in (20, 50, 200)},
}


def main() -> None:
    """Simulates the days, prints the tables, keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=1000)
    parser.add_argument("--users", type=int, default=2500, help="of a day")
    parser.add_argument("--large", type=int, default=100, help="days of 1M rows, or 0")
    parser.add_argument("--minutes", type=float, default=60, help="for days of each size")
    options = parser.parse_args()
    population = simulate(np.random.default_rng(1), 2_000_000, (1.0, 1.0, 1.5), one_row=True)
    known = pl.DataFrame(list(truth(population)), schema=[*KEYS, "truth"], orient="row")
    error_M = (1.0, 1.0, planted_error(population))
    del population
    metrics = list(dict.fromkeys(known.select("task", "metric").iter_rows()))
    print("the population is known", file=sys.stderr)
    covering, differing = simulated_days(options.days, options.users, error_M, metrics, options.minutes)
    tables = {"coverage": coverage(covering, known), "differences": detections(differing)}
    for table in tables.values():
        print(tabulate(table.to_dicts(), headers="keys", floatfmt=".3f"), "\n", flush=True)
    found: dict[str, object] = {name: table.to_dicts() for name, table in tables.items()}
    found |= {"error_of_c": error_M[2], "machine": machine()}
    if options.large:
        found["large"] = large_days(options.large, round(1_000_000 / ROWS_PER_USER), error_M, options.minutes)
        print(json.dumps(found["large"], indent=1))
    (RESULTS / "intervals.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


def truth(log: SimulatedLog) -> Iterator[tuple[str, str, str, float]]:
    """Task, metric, slice and the metric in the population, of independent rows."""
    slices = {ALL: np.ones(len(log.click_N), bool), "device=tablet": log.tablet_N, "country=rare": log.rare_N}
    for name, inside_N in slices.items():
        y_N, p_N = log.click_N[inside_N], 1 / (1 + np.exp(-log.logit_MN[0, inside_N].astype(np.float64)))
        loss, rate = log_loss(y_N, p_N), float(y_N.mean(dtype=np.float64))
        entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
        excess_N = (p_N - y_N)[np.argsort(p_N)]
        yield "click", "ne", name, loss / entropy
        yield "click", "log_loss", name, loss
        yield "click", "calibration", name, float(p_N.mean() / rate)
        yield "click", "auc", name, roc_auc_score(y_N, p_N)
        yield "click", "pr_auc", name, average_precision_score(y_N, p_N)
        yield "click", "ece", name, sum(abs(part.sum()) for part in np.array_split(excess_N, 20)) / len(y_N)
        y_N, z_N = (x_N[inside_N].astype(np.float64) for x_N in (log.spend_N, log.prediction_N))
        yield "spend", "mse", name, float(np.mean((z_N - y_N) ** 2))
        yield "spend", "nrmse", name, float(np.sqrt(np.mean((z_N - y_N) ** 2)) / y_N.std())
        yield "spend", "mae", name, float(np.abs(z_N - y_N).mean())
        yield "spend", "calibration", name, float(z_N.mean() / y_N.mean())
    # Of pairs of rows in order less those in the wrong one; labels and predictions are continuous.
    tau = kendalltau(log.spend_N[:500_000], log.prediction_N[:500_000]).statistic
    yield "spend", "xauc", ALL, (1 + tau) / 2
    users = metrics_of(simulate(np.random.default_rng(2), 200_000), buckets=1, sliced=False).compute()["click"]
    for metric in ("gauc", "ndcg"):
        yield "click", metric, ALL, users[metric]


def planted_error(log: SimulatedLog) -> float:
    """The size of errors that makes NE worse by `PLANTED`: NE rises by their variance, from that of models a and c."""
    ne_a, ne_b, ne_c = (
        log_loss(log.click_N, 1 / (1 + np.exp(-logit_N.astype(np.float64)))) for logit_N in log.logit_MN
    )
    equal = (ne_a + ne_b) / 2
    return float(np.sqrt(1 + (1.5**2 - 1) * PLANTED / (ne_c / equal - 1)))


def simulated_days(
    days: int, users: int, error_M: tuple[float, ...], metrics: list[tuple[str, str]], minutes: float
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Figures by method, and differences of models, of each day."""
    covering, differing, begin = [], [], time.perf_counter()
    for day in range(days):
        if time.perf_counter() - begin > 60 * minutes:
            break
        log = simulate(np.random.default_rng([3, day]), users, error_M)
        found = {method: metrics_of(log, **options).figures() for method, options in METHODS.items()}
        for method, figures in found.items():
            for task, metric in (key for key in metrics if key[0] in figures):
                figure = figures[task][metric]
                covering.append((method, task, metric, *with_errors(figure.value_S, figure.left_out_SK)))
        for model, pair in ((1, "a, b"), (2, "a, c")):
            other = metrics_of(log, model).figures()["click"]
            for metric in (metric for task, metric in metrics if task == "click"):
                a, b = found[USER]["click"][metric], other[metric]
                apart = np.hypot(standard_error(a.left_out_SK), standard_error(b.left_out_SK))
                both = with_errors(a.value_S - b.value_S, a.left_out_SK - b.left_out_SK)
                differing.append((pair, "click", metric, *both, apart))
        if day % 50 == 49:
            print(f"{day + 1} days, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    columns = ["task", "metric", "slice", "value", "se", "buckets"]
    return (
        pl.DataFrame(covering, schema=["method", *columns], orient="row").explode(columns[2:]).drop_nans("value"),
        pl.DataFrame(differing, schema=["pair", *columns, "unpaired_se"], orient="row")
        .explode(*columns[2:], "unpaired_se")
        .drop_nans("value"),
    )


def with_errors(value_S: np.ndarray, left_out_SK: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Slices, the values, their standard errors, and how many buckets have rows."""
    names = [ALL, *(name for names in SLICES for name in names)]
    return names[: len(value_S)], value_S, standard_error(left_out_SK), buckets_used(left_out_SK)


def coverage(covering: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """How often intervals hold the truth, and the metric's mean over days."""
    mean = pl.col("value").mean().over("method", *KEYS)
    length = pl.Series("reach", quantile(CONFIDENCE, covering["buckets"].to_numpy())) * covering["se"]
    within, of_mean = ((pl.col("value") - centre).abs() <= pl.col("reach") for centre in (pl.col("truth"), mean))
    spread = pl.col("value").std()
    return covering.with_columns(length).join(known, on=KEYS).with_columns(within=within, of_mean=of_mean).group_by(
        "method", *KEYS, maintain_order=True
    ).agg(
        pl.col("truth").first(),
        pl.col("within").mean().alias("coverage"),
        pl.col("of_mean").mean().alias("coverage of the mean over days"),
        (pl.col("se").mean() / spread).alias("se / sd"),
        ((pl.col("value").mean() - pl.col("truth").first()) / spread).alias("bias / sd"),
        pl.col("buckets").mean(),
        pl.len().alias("days"),
    )  # fmt: skip


def detections(differing: pl.DataFrame) -> pl.DataFrame:
    """How often intervals of a difference leave out 0."""
    reach = pl.Series("reach", quantile(CONFIDENCE, differing["buckets"].to_numpy()))
    return differing.with_columns(reach).group_by("pair", *KEYS, maintain_order=True).agg(
        (pl.col("value").abs() > pl.col("reach") * pl.col("se")).mean().alias("paired"),
        (pl.col("value").abs() > pl.col("reach") * pl.col("unpaired_se")).mean().alias("unpaired"),
        (pl.col("unpaired_se").mean() / pl.col("se").mean()).alias("unpaired se / paired se"),
        (pl.col("se").mean() / pl.col("value").std()).alias("se / sd"),
        pl.len().alias("days"),
    )  # fmt: skip


def large_days(days: int, users: int, error_M: tuple[float, ...], minutes: float) -> dict[str, object]:
    """False alarms and power for NE on large logs, and power at other sizes."""
    pairs: dict[str, list[pl.DataFrame]] = {"a, b": [], "a, c": []}
    rows, begin = [], time.perf_counter()
    for day in range(days):
        if time.perf_counter() - begin > 60 * minutes:
            break
        log = simulate(np.random.default_rng([4, day]), users, error_M)
        rows.append(len(log.user_N))
        a, b, c = (evaluated_of(metrics_of(log, model, sliced=False), names=("ne",)) for model in range(3))
        for name, other in (("a, b", b), ("a, c", c)):
            pairs[name].append(paired(a, other).filter(metric="ne"))
        if day % 5 == 4:
            print(f"{day + 1} large days, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    found: dict[str, object] = {"days": len(rows), "rows": float(np.mean(rows)), "planted": PLANTED}
    reach = float(quantile(CONFIDENCE, BUCKETS))
    for name, parts in pairs.items():
        both = pl.concat(parts)
        found[name] = {
            "leaves out 0": float((both["relative"].abs() > reach * both["relative_se"]).mean()),
            "relative difference": both["relative"].mean(),
            "relative_se": both["relative_se"].mean(),
            "se / sd": both["relative_se"].mean() / both["relative"].std(),
        }
    error = pl.concat(pairs["a, c"])["relative_se"].mean() * np.mean(rows) ** 0.5
    found["power by rows"] = {
        str(size): float(nct.sf(reach, BUCKETS - 1, PLANTED * size**0.5 / error)) for size in SIZES
    }
    return found


if __name__ == "__main__":
    main()
