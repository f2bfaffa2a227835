"""Gates on figures that have a value, but no interval since too few buckets of users have rows that it needs."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.metrics.base import Grouping
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance
from pipeline.release.gates import judge
from pipeline.release.gates_config import Gates
from pipeline.release.verdict import GateVerdict

KINDS = {"click": "binary"}
ROWS, BUCKETS = 1000, 10
ONE_USER = np.zeros(ROWS, np.uint64)


def scored(user_N: np.ndarray, positive_N: np.ndarray, shift: float = 0.0) -> Evaluated:
    """Figures of a model, better than the base rate, whose logits are shifted. Args: the hash of each row's user, labels."""
    label_N = positive_N.astype(float)
    logit_N = np.random.default_rng(1).normal(-2, 1, ROWS) + 3 * label_N + shift
    metrics = Metrics([*KINDS.items()], Grouping(buckets=BUCKETS))
    key_NC = torch.tensor(np.stack([user_N.astype(np.int64), np.arange(ROWS)], 1))
    logit_NT, label_NT = (torch.tensor(x_N)[:, None] for x_N in (logit_N, label_N))
    metrics.update(logit_NT, label_NT, torch.ones(ROWS, 1).bool(), torch.ones(ROWS, 1), key_NC)
    source = Provenance(run="r", step=1, checkpoint="c", dataset="d", split="test", buckets=BUCKETS)
    return Evaluated(metrics.frame(metrics.figures()), source)


def judged(gate: dict, candidate: Evaluated, serving: Evaluated | None = None) -> GateVerdict:
    return judge(Gates.model_validate({"default": [gate]}, strict=True), KINDS, candidate, serving).gates[0]


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {"all rows are one user's": (ONE_USER, rng.random(ROWS) < 0.1)}


@pytest.mark.parametrize("metric", ["ne", "auc", "calibration"])
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
