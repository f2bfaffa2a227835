"""Harm of slices against its definition in plain loops over rows, and its properties."""

import math

import numpy as np
import polars as pl
import pytest

from pipeline.evaluation.metrics.evaluated import COLUMNS, Evaluated, Provenance
from pipeline.evaluation.report.harm import harms

N, K = 4000, 10
RNG = np.random.default_rng(3)
SLICE = RNG.integers(0, 3, N)  # whose rows have each slice's number
BUCKET = RNG.integers(0, K, N)
WEIGHT = RNG.uniform(0.5, 2, N)
PROBABILITY = RNG.uniform(0.02, 0.5, N)
CLICK = (RNG.uniform(size=N) < PROBABILITY).astype(float)
DWELL = RNG.normal(3 + SLICE, 1 + 0.5 * SLICE)
GUESS = 0.8 * PROBABILITY + 0.05 + 0.3 * (SLICE == 1)  # too high in one slice
ESTIMATE = 3 + SLICE + 0.4 * (SLICE == 2)


def figures(predicted: np.ndarray, label: np.ndarray, kind: str, kept: np.ndarray) -> dict[str, float]:
    """The metrics that harm is made of, of the rows kept, by their formulas."""
    p, y, w = predicted[kept], label[kept], WEIGHT[kept]
    total = w.sum()
    mean = (w * y).sum() / total
    if kind == "binary":
        loss = -(w * (y * np.log(p) + (1 - y) * np.log1p(-p))).sum() / total
        entropy = -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean))
        return {"weight_sum": total, "base_rate": mean, "log_loss": loss, "ne": loss / entropy}
    mse, variance = (w * (p - y) ** 2).sum() / total, (w * (y - mean) ** 2).sum() / total
    return {"weight_sum": total, "label_mean": mean, "mse": mse, "nrmse": math.sqrt(mse / variance)}


def evaluated(predicted: np.ndarray, label: np.ndarray, kind: str, sums_by_bucket: bool = True) -> Evaluated:
    lines = []
    for dimension, name, rows in [("all", "all", SLICE >= 0), *(("x", f"x={s}", s == SLICE) for s in range(3))]:
        left = [figures(predicted, label, kind, rows & (bucket != BUCKET)) for bucket in range(K)]
        for metric, value in figures(predicted, label, kind, rows).items():
            kept = [x[metric] for x in left] if sums_by_bucket or metric != "weight_sum" else []
            lines.append(("t", metric, dimension, name, int(rows.sum()), value, 0.1, kept))
    provenance = Provenance(run="r", step=1, checkpoint="c", dataset="d", split="test", cluster="user", buckets=K)
    return Evaluated(pl.DataFrame(lines, schema=COLUMNS, orient="row"), provenance)


def gain(
    predicted: np.ndarray, label: np.ndarray, kind: str, number: int, kept: np.ndarray, other: np.ndarray | None
) -> float:
    """What the headline metric of the rows kept would fall by, from the definition, row by row."""
    name, loss_name = ("ne", "log_loss") if kind == "binary" else ("nrmse", "mse")
    everything = figures(predicted, label, kind, kept)
    inside, rest = (figures(predicted, label, kind, kept & part) for part in (number == SLICE, number != SLICE))
    if other is not None:
        wanted = figures(other, label, kind, kept & (number == SLICE))[loss_name]
    else:
        power = 1 if kind == "binary" else 2
        wanted = rest[name] ** power * inside[loss_name] / inside[name] ** power
    share = inside["weight_sum"] / everything["weight_sum"]
    improved = everything[loss_name] - share * (inside[loss_name] - wanted)
    if kind == "binary":
        return everything["ne"] * (1 - improved / everything["log_loss"])
    return everything["nrmse"] * (1 - math.sqrt(improved / everything["mse"]))


CASES = [("binary", GUESS, CLICK, PROBABILITY), ("regression", ESTIMATE, DWELL, 3.0 + SLICE)]


@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize(("kind", "predicted", "label", "other"), CASES)
def test_harm_is_what_the_metric_would_fall_by_with_its_jackknife_error(kind, predicted, label, other, against):
    baseline = evaluated(other, label, kind) if against else None
    found = {one.name: one for one in harms(evaluated(predicted, label, kind), "t", kind, baseline)}
    assert found.keys() == {"x=0", "x=1", "x=2"}
    for number in range(3):
        one, theirs = found[f"x={number}"], other if against else None
        value = gain(predicted, label, kind, number, SLICE >= 0, theirs)
        left = [gain(predicted, label, kind, number, bucket != BUCKET, theirs) for bucket in range(K)]
        error = math.sqrt((K - 1) / K * sum((x - np.mean(left)) ** 2 for x in left))
        assert one.harm.value == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert one.harm.high - one.harm.low == pytest.approx(2 * 2.2621571628 * error, rel=1e-6)  # t of 9 degrees
        assert one.share == pytest.approx(WEIGHT[number == SLICE].sum() / WEIGHT.sum())
        assert one.rows == (number == SLICE).sum()


def test_the_slice_with_planted_errors_comes_first_and_lies_clearly_above_zero():
    first, *others = harms(evaluated(GUESS, CLICK, "binary"), "t", "binary")
    assert first.name == "x=1"
    assert first.harm.low > 0
    assert all(one.harm.value < first.harm.value for one in others)


def test_a_model_has_no_harm_against_itself():
    of = evaluated(GUESS, CLICK, "binary")
    assert all(abs(one.harm.value) < 1e-12 for one in harms(of, "t", "binary", of))


def test_sums_without_values_by_bucket_give_the_same_harm_and_nearly_its_interval():
    exact = harms(evaluated(GUESS, CLICK, "binary"), "t", "binary")
    rough = harms(evaluated(GUESS, CLICK, "binary", sums_by_bucket=False), "t", "binary")
    for a, b in zip(exact, rough, strict=True):
        assert (a.name, a.harm.value) == (b.name, b.harm.value)
        assert b.harm.low == pytest.approx(a.harm.low, abs=0.1 * (a.harm.high - a.harm.low))


def test_slices_below_the_minimum_and_undefined_ones_do_not_disturb_the_order():
    of = evaluated(GUESS, CLICK, "binary")
    smallest = min((s == SLICE).sum() for s in range(3))
    assert len(harms(of, "t", "binary", minimum=int(smallest) + 1)) == 2
    blank = of.figures.with_columns(
        value=pl.when((pl.col("slice") == "x=1") & (pl.col("metric") == "log_loss"))
        .then(None)
        .otherwise(pl.col("value"))
    )
    found = harms(Evaluated(blank, of.provenance), "t", "binary")
    assert found[-1].name == "x=1"
    assert found[-1].harm.value is None


def test_an_evaluation_without_what_harm_is_made_of_has_none():
    of = evaluated(GUESS, CLICK, "binary")
    assert harms(Evaluated(of.figures.filter(pl.col("metric") != "weight_sum"), of.provenance), "t", "binary") == []
    assert harms(Evaluated(of.figures.filter(pl.col("slice") == "all"), of.provenance), "t", "binary") == []
