"""Logs with planted structure against brute force, agreement of selections with groups, and a search that finds the groups."""

from itertools import combinations
from pathlib import Path

import numpy as np
import planted
import planted_logs
import pytest
from planted_logs import agreement, two_clusters

from jobs.entry import bound_resolvers

ROWS = 4000
GROUPS = (("a", "b"), ("c", "d"))


def logit(p_N: np.ndarray) -> np.ndarray:
    return np.log(p_N / (1 - p_N))


def test_a_product_says_nothing_about_a_label_given_one_of_its_fields() -> None:
    u_NN, w_NN = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
    p_NN = planted_logs.product(np.random.default_rng(3), u_NN.ravel(), w_NN.ravel(), 40).reshape(40, 40)
    np.testing.assert_allclose(p_NN.mean(0), 0.5, atol=1e-12)
    np.testing.assert_allclose(p_NN.mean(1), 0.5, atol=1e-12)
    assert p_NN.std() > 0.2


def test_labels_of_the_second_group_follow_from_its_ids_alone() -> None:
    log = planted_logs.groups(3, ROWS)
    cell_N = log.ids["b0"] * 16 + log.ids["b1"]
    for task in log.groups[1]:
        assert all(np.ptp(log.probability[task][cell_N == cell]) < 1e-9 for cell in np.unique(cell_N))


def test_labels_of_the_first_group_follow_from_its_ids_and_number_alone() -> None:
    log = planted_logs.groups(3, ROWS)
    cell_N = log.ids["a0"] * 16 + log.ids["a1"]
    for task in log.groups[0]:
        for cell in np.unique(cell_N)[:50]:
            order = np.argsort(log.numbers["a_x"][cell_N == cell])
            x_N = log.numbers["a_x"][cell_N == cell][order]
            z_N = logit(log.probability[task][cell_N == cell][order])
            slope_N = np.abs(np.diff(z_N) / np.diff(x_N))  # of k |x + c|: k, but for the pair of rows around -c
            assert (np.abs(slope_N - np.median(slope_N)) > 1e-4 * np.median(slope_N)).sum() <= 1


def test_groups_have_no_feature_in_common_and_tasks_of_one_are_alike() -> None:
    log = planted_logs.groups(3, 20_000)
    correlation = {
        pair: abs(np.corrcoef(*(log.probability[task] for task in pair))[0, 1]) for pair in combinations(log.label, 2)
    }
    within = {tuple(group) for group in log.groups}
    assert min(correlation[pair] for pair in within) > 0.7
    assert max(r for pair, r in correlation.items() if pair not in within) < 0.05


def test_logits_of_the_linear_log_are_sums_over_features() -> None:
    log = planted_logs.linear_only(3, ROWS)
    columns = [*(np.eye(16)[id_N] for id_N in log.ids.values()), *(x_N[:, None] for x_N in log.numbers.values())]
    x_ND = np.concatenate([*columns, np.ones((ROWS, 1))], 1)
    for p_N in log.probability.values():
        fitted_N = x_ND @ np.linalg.lstsq(x_ND, logit(p_N), rcond=None)[0]
        np.testing.assert_allclose(fitted_N, logit(p_N), atol=1e-8)


def test_nothing_explains_the_noise_and_it_weighs_most() -> None:
    log = planted_logs.noise(3, 20_000)
    assert set(log.probability["noise"]) == {0.5}
    assert log.weight == {"click": 1, "like": 1, "noise": 5}
    label_N = log.label["noise"]
    assert all(abs(np.corrcoef(label_N, x_N)[0, 1]) < 0.03 for x_N in (*log.ids.values(), *log.numbers.values()))


def test_attainable_ne_is_that_of_the_true_probabilities() -> None:
    log = planted_logs.product_only(3, 50_000)
    p_N, y_N = log.probability["click"], log.label["click"]
    loss = np.mean([-np.log(p if y else 1 - p) for p, y in zip(p_N, y_N, strict=True)])
    assert planted_logs.attainable(log)["click"] == pytest.approx(loss / np.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("strength", "wanted"),
    [
        ([[0.9, 0.1, 0], [0.8, 0.2, 0], [0, 0.1, 0.9], [0, 0.3, 0.7]], 1.0),
        ([[0.9, 0.1, 0], [0, 0.1, 0.9], [0.8, 0.2, 0], [0, 0.3, 0.7]], 1 / 3),
        ([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.8, 0.2, 0], [0, 0, 1]], 1 / 2),
    ],
    ids=["as planted", "across the groups", "one task apart"],
)
def test_agreement_of_selections(strength: list[list[float]], wanted: float) -> None:
    assert agreement(dict(zip("abcd", strength, strict=True)), GROUPS) == pytest.approx(wanted)


def test_two_pairs_by_chance_agree_in_five_of_nine() -> None:
    found = []
    for first in ("b", "c", "d"):  # the other task of a's cluster
        strength = {task: [1.0, 0.0] if task in ("a", first) else [0.0, 1.0] for task in "abcd"}
        assert {frozenset({"a", first})} < {*two_clusters(strength)}
        found.append(agreement(strength, GROUPS))
    assert np.mean(found) == pytest.approx(5 / 9)


@pytest.mark.system
def test_a_search_finds_the_groups(tmp_path: Path) -> None:
    """As the benchmark's first search does; of seeds 0 to 4 three do."""
    seed = planted.FIRST_SEED
    bound_resolvers()
    log = planted_logs.groups(seed, planted.ROWS)
    dataset = planted_logs.write(log, tmp_path / "data")
    _, figures = planted.searched(dataset, tmp_path / "run", seed, planted.CASES["groups"].variants["diversity 0.01"])
    assert agreement(dict(zip(log.label, figures["tasks"], strict=True)), log.groups) == 1
