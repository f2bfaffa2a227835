"""Gates on figures that have a value, but no interval since too few buckets of users have rows that it needs."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.metrics.accumulator import Metrics, errors_of
from pipeline.evaluation.metrics.base import Grouping
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance
from pipeline.release.gates import judge
from pipeline.release.gates_config import Gates
from pipeline.release.verdict import GateVerdict

KINDS = {"click": "binary"}
ROWS, BUCKETS = 1000, 8
ONE_USER = np.zeros(ROWS, np.uint64)


def measured(user_N: np.ndarray, positive_N: np.ndarray, shift: float = 0.0) -> Metrics:
    """Of a model, better than the base rate, whose logits are shifted. Args: the hash of each row's user, labels."""
    label_N = positive_N.astype(float)
    logit_N = np.random.default_rng(1).normal(-2, 1, ROWS) + 3 * label_N + shift
    metrics = Metrics([*KINDS.items()], Grouping(buckets=BUCKETS))
    key_NC = torch.tensor(np.stack([user_N.astype(np.int64), np.arange(ROWS)], 1))
    logit_NT, label_NT = (torch.tensor(x_N)[:, None] for x_N in (logit_N, label_N))
    metrics.update(logit_NT, label_NT, torch.ones(ROWS, 1).bool(), torch.ones(ROWS, 1), key_NC)
    return metrics


def scored(user_N: np.ndarray, positive_N: np.ndarray, shift: float = 0.0) -> Evaluated:
    """The figures of that."""
    metrics = measured(user_N, positive_N, shift)
    source = Provenance(run="r", step=1, checkpoint="c", dataset="d", split="test", buckets=BUCKETS)
    return Evaluated(metrics.frame(metrics.figures()), source)


def judged(gate: dict, candidate: Evaluated, serving: Evaluated | None = None) -> GateVerdict:
    return judge(Gates.model_validate({"default": [gate]}, strict=True), KINDS, candidate, serving).gates[0]


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    labels_N, users_N = rng.random(ROWS) < 0.1, rng.integers(0, 1 << 32, ROWS, np.uint64)
    of_one_N = users_N >> 29 == 3  # an eighth of the users, which is in one of 8 buckets
    return {
        "all rows are one user's": (ONE_USER, labels_N),
        "all positives are in one bucket": (users_N, of_one_N & (rng.random(ROWS) < 0.5)),
        "all negatives are in one bucket": (users_N, ~(of_one_N & labels_N)),
    }


@pytest.mark.parametrize("metric", ["ne", "auc"])
@pytest.mark.parametrize(
    "bounds", [{"min": 9.0}, {"max": 9.0}, {"min": 9.0, "min_rows": 10}, {"max": 9.0, "min_rows": 10}]
)
@pytest.mark.parametrize("case", cases())
def test_a_value_without_an_interval_neither_passes_nor_fails(case: str, metric: str, bounds: dict) -> None:
    found = judged({"metric": metric, **bounds}, scored(*cases()[case]))
    assert found.candidate is not None
    assert (found.outcome, found.low, found.more_rows) == ("undecided", None, None)
    assert "no interval: too few buckets of users have rows, or rows of both classes" in found.why


@pytest.mark.parametrize("change", [{"worse_by_at_most": 9}, {"better_by_at_least": 0.5}, {"worse_by_at_most": "1%"}])
@pytest.mark.parametrize("min_rows", [None, 10])
@pytest.mark.parametrize("case", cases())
def test_a_change_without_an_interval_neither_passes_nor_fails(case: str, min_rows: int | None, change: dict) -> None:
    ours, theirs = (scored(*cases()[case], shift) for shift in (0.3, 0.0))
    for candidate, serving in ((ours, theirs), (theirs, ours)):
        found = judged({"metric": "ne", "change": change, "min_rows": min_rows}, candidate, serving)
        assert found.estimate is not None
        assert (found.outcome, found.low) == ("undecided", None)
        assert "no interval: too few buckets of users" in found.why


def test_a_metric_that_needs_both_classes_has_no_standard_error_where_one_is_in_a_single_bucket() -> None:
    figures = measured(*cases()["all positives are in one bucket"]).figures()
    assert figures["click"]["ne"].value_S[0] < 1
    assert errors_of(figures)["click"].keys() == {"base_rate", "log_loss", "ece"}  # defined without positives
