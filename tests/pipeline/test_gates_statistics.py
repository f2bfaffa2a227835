"""Verdicts on simulated users: planted regressions fail the right gate, and gates err as rarely as they state."""

# Shapes: N rows, U users.

import numpy as np
import pytest
from evaluated_by_hand import evaluated, line, ne_of, scored

from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.release.gates import judge
from pipeline.release.gates_config import Gates
from pipeline.release.verdict import GateVerdict

BUCKETS = 20
KINDS = {"click": "binary", "buy": "binary"}
GATES = Gates.model_validate(
    {
        "default": [
            {"metric": "ne", "change": {"worse_by_at_most": 0.01}},
            {"metric": "ne", "slices": "device", "change": {"worse_by_at_most": 0.02}},
            {"metric": "auc", "change": {"worse_by_at_most": "2%"}},
            {"metric": "calibration", "band": [0.9, 1.1]},
        ]
    },
    strict=True,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Day:
    """A day of two tasks: users of several rows, their true logits, and a serving model that knows these with some noise."""

    def __init__(self, seed: int, users: int = 3000, rows: int = 10) -> None:
        rng = np.random.default_rng(seed)
        user_N = np.repeat(np.arange(users), rows)
        self.bucket_N = rng.integers(0, BUCKETS, users)[user_N]
        device_N = rng.choice(["desktop", "mobile", "tablet"], users, p=[0.5, 0.3, 0.2])[user_N]
        self.slices = {f"device={name}": device_N == name for name in ("desktop", "mobile", "tablet")}
        self.logits, self.labels = {}, {}
        for task in KINDS:
            logit_N = -1 + rng.normal(0, 0.5, users)[user_N] + rng.normal(0, 1, len(user_N))
            self.labels[task] = (rng.random(len(user_N)) < sigmoid(logit_N)).astype(float)
            self.logits[task] = logit_N + rng.normal(0, 0.3, len(user_N))

    def evaluated(self, **added_N: np.ndarray | float) -> Evaluated:
        """The figures of a model with the given errors of its logits added."""
        lines = []
        for task in KINDS:
            p_N = sigmoid(self.logits[task] + added_N.get(task, 0.0))
            lines += scored(task, self.labels[task], p_N, self.bucket_N, self.slices)
        return evaluated(lines)

    def noise(self, size: float) -> np.ndarray:
        return np.random.default_rng(1).normal(0, size, len(self.bucket_N))


@pytest.fixture(scope="module")
def day() -> Day:
    return Day(0)


@pytest.fixture(scope="module")
def serving(day: Day) -> Evaluated:
    return day.evaluated()


def failing(day: Day, serving: Evaluated, **added_N: np.ndarray | float) -> set[tuple[str, str, str]]:
    """Task, metric and slice of the gates that fail; all others pass."""
    found = judge(GATES, KINDS, day.evaluated(**added_N), serving).gates
    undecided: list[GateVerdict] = [gate for gate in found if gate.outcome == "undecided"]
    assert undecided == []
    return {(gate.task, gate.metric, gate.slice) for gate in found if gate.outcome == "fail"}


def test_a_model_of_the_same_quality_passes_every_gate(day: Day, serving: Evaluated) -> None:
    assert failing(day, serving) == set()


def test_a_regression_of_one_task_fails_the_gates_of_this_task(day: Day, serving: Evaluated) -> None:
    devices = {("buy", "ne", name) for name in ("all", *day.slices)}
    assert failing(day, serving, buy=day.noise(1.0)) == devices | {("buy", "auc", "all")}


def test_a_regression_of_one_slice_fails_the_gate_of_this_slice(day: Day, serving: Evaluated) -> None:
    broken_N = np.where(day.slices["device=tablet"], day.noise(0.5), 0.0)
    assert failing(day, serving, click=broken_N) == {("click", "ne", "device=tablet")}


def test_a_shift_of_calibration_fails_the_band_and_nothing_else(day: Day, serving: Evaluated) -> None:
    assert failing(day, serving, click=0.25) == {("click", "calibration", "all")}


def outcomes(margin: dict, by_user: bool, repeats: int = 300) -> list[str]:
    """What one gate on NE comes to for two models that err equally, the rows of a user alike."""
    gates = Gates.model_validate({"default": [{"metric": "ne", "change": margin}]}, strict=True)
    rng, found = np.random.default_rng(1), []
    users, rows = 400, 20
    user_N = np.repeat(np.arange(users), rows)
    for _ in range(repeats):
        logit_N = -1 + rng.normal(0, 1, users)[user_N]
        label_N = (rng.random(users)[user_N] < sigmoid(logit_N)).astype(float)  # a user's rows have one label
        bucket_N = rng.integers(0, BUCKETS, users)[user_N] if by_user else rng.integers(0, BUCKETS, len(user_N))
        lines = []
        for _ in range(2):
            p_N = sigmoid(logit_N + rng.normal(0, 0.5, users)[user_N])
            lines.append([line("click", "ne", ne_of(label_N, p_N), without_each(label_N, p_N, bucket_N))])
        found.append(judge(gates, {"click": "binary"}, evaluated(lines[0]), evaluated(lines[1])).gates[0].outcome)
    return found


def without_each(label_N: np.ndarray, p_N: np.ndarray, bucket_N: np.ndarray) -> np.ndarray:
    """NE without each bucket, from sums by bucket."""
    loss_N = -np.where(label_N == 1, np.log(p_N), np.log1p(-p_N))
    loss, positive, rows = (np.bincount(bucket_N, x, BUCKETS) for x in (loss_N, label_N, np.ones(len(label_N))))
    loss, positive, rows = loss.sum() - loss, positive.sum() - positive, rows.sum() - rows
    rate = positive / rows
    return loss / rows / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def test_the_sums_by_bucket_are_the_figures_without_each_bucket() -> None:
    rng = np.random.default_rng(2)
    label_N, p_N, bucket_N = (rng.random(500) < 0.3).astype(float), rng.random(500), rng.integers(0, BUCKETS, 500)
    expected = [ne_of(label_N[bucket_N != bucket], p_N[bucket_N != bucket]) for bucket in range(BUCKETS)]
    assert without_each(label_N, p_N, bucket_N) == pytest.approx(expected)


def test_a_gate_whose_margin_is_the_true_difference_passes_and_fails_as_rarely_as_it_states() -> None:
    found = outcomes({"worse_by_at_most": 0}, by_user=True)
    # 5% of 300 is 15, with a standard deviation of 3.8.
    assert 4 <= found.count("pass") <= 27
    assert 4 <= found.count("fail") <= 27


def test_buckets_of_single_rows_would_err_several_times_as_often() -> None:
    found = outcomes({"worse_by_at_most": 0}, by_user=False)
    assert found.count("pass") > 45
    assert found.count("fail") > 45
