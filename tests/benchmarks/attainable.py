"""The NE that what a row of the generated log shows allows, beside that of the true probabilities.

    python tests/benchmarks/attainable.py --raw runs/demo/raw --date 2026-11-08

The true probabilities also depend on what no column has: each user's own effect, an item's quality of which the logged click
rate is a noisy reading, and values that are missing. Here these are integrated out, all else is known exactly: a model that
had learnt everything but ids by heart would end here. NE is in expectation over the events, so no luck of the draw is in it.
"""

# Shapes: B rows, K effects, T tasks (click, conversion, dwell), N nodes of a quadrature.

import argparse
import datetime
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.synthetic.draws import Array, sigmoid
from pipeline.synthetic.event_log import DWELL_SIGMA, ROWS, LogConfig, World

RATE_BIAS, RATE_SLOPE, RATE_NOISE = -1.9, 0.5, 0.15  # of item_ctr_7d's logit, by quality (event_log._impressions)
# A column that is missing hides these effects.
HIDDEN = {"user_age": ["age", "age peak"], "item_price": ["price", "price peak"], "country": ["country"]}


def expected_ne(true_B: Array, predicted_B: Array, weight_B: Array) -> float:
    """Cross-entropy of predictions under true probabilities, over the entropy of their weighted mean."""
    loss_B = -(true_B * np.log(predicted_B) + (1 - true_B) * np.log1p(-predicted_B))
    rate = float(weight_B @ true_B / weight_B.sum())
    return float(weight_B @ loss_B / weight_B.sum()) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def shown(world: World, effects: dict[str, Array], columns: pl.DataFrame) -> tuple[Array, Array]:
    """Mean and variance of each task's logit given the columns: mean_BT, variance_BT."""
    names, z_BK = list(effects), world.standardised(effects)
    spread_K, variance_BK = z_BK.std(0), np.zeros_like(z_BK)

    def hide(name: str, hidden_B: Array) -> None:
        k = names.index(name)
        z_BK[hidden_B, k], variance_BK[hidden_B, k] = z_BK[:, k].mean(), spread_K[k] ** 2

    hide("user", np.ones(len(z_BK), dtype=bool))
    for column, hidden in HIDDEN.items():
        for name in hidden:
            hide(name, columns[column].is_null().to_numpy())
    for name in ["device", *(name for name in names if name.startswith("place"))]:
        hide(name, columns["device"].is_null().to_numpy())
    # Quality is normal, and so is its reading: the posterior is, too.
    k, rate_B = names.index("quality"), columns["item_ctr_7d"].to_numpy().astype(np.float64)
    reading_B = np.nan_to_num(np.log(rate_B / (1 - rate_B)) - RATE_BIAS)
    trust = RATE_SLOPE**2 / (RATE_SLOPE**2 + RATE_NOISE**2) * ~np.isnan(rate_B)
    unit = world.strength_K[k] / world.std_K[k]
    z_BK[:, k] = (trust * reading_B / RATE_SLOPE - world.mean_K[k]) * unit
    variance_BK[:, k] = (1 - trust) * unit**2
    return z_BK @ world.weight_KT + world.bias_T, variance_BK @ world.weight_KT**2


def main() -> None:
    """Prints a line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--raw", type=Path, required=True, help="folder of a log that jobs.generate wrote by its defaults"
    )
    parser.add_argument("--date", type=datetime.date.fromisoformat, default=datetime.date(2026, 11, 8))
    arguments = parser.parse_args()
    config = LogConfig()
    world = World(config)
    rng = np.random.default_rng([config.seed, ROWS, arguments.date.toordinal()])
    effects = world.effects(world.rows(rng, arguments.date, config.rows_per_day))
    columns = pl.read_csv(arguments.raw / f"impressions-{arguments.date}.csv")
    logit_BT = world.standardised(effects) @ world.weight_KT + world.bias_T
    mean_BT, variance_BT = shown(world, effects, columns)
    node_N, weight_N = np.polynomial.hermite_e.hermegauss(21)
    click_B = sigmoid(logit_BT[:, 0])
    for t, (task, counts_B) in enumerate((("click", np.ones(len(click_B))), ("conversion", click_B))):
        true_B = sigmoid(logit_BT[:, t])
        each_BN = sigmoid(mean_BT[:, t, None] + np.sqrt(variance_BT[:, t, None]) * node_N)
        best = expected_ne(true_B, each_BN @ weight_N / weight_N.sum(), counts_B)
        _print(task, "NE", expected_ne(true_B, true_B, counts_B), best)
    truth_B, mean_B = logit_BT[:, 2], float(click_B @ logit_BT[:, 2] / click_B.sum())
    spread = float(click_B @ (truth_B - mean_B) ** 2 / click_B.sum()) + DWELL_SIGMA**2
    error = float(click_B @ (truth_B - mean_BT[:, 2]) ** 2 / click_B.sum()) + DWELL_SIGMA**2
    possible, best = (DWELL_SIGMA**2 / spread) ** 0.5, (error / spread) ** 0.5
    _print("dwell", "NRMSE", possible, best)


def _print(task: str, metric: str, possible: float, best: float) -> None:
    share = (1 - best) / (1 - possible)
    print(f"{task:12} {metric} {possible:.4f} by the truth, {best:.4f} by what a row shows: {share:.1%} of the way")


if __name__ == "__main__":
    main()
