"""Logs whose structure is known, for planted.py: which features each label depends on, and how.

Ids are drawn evenly. Every seed draws another law and other rows. The probability of each label is kept, so what no model can
do better than is known too.
"""

# Shapes: N rows, V ids of a feature, K dimensions of a latent vector.

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from dataset_from_rows import parse_text, write_dataset
from numpy.typing import NDArray

from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.parse.raw import SPLIT
from features.schema.schema import SPLITS, Schema

Array = NDArray[Any]
NOISE = "noise"  # the task that nothing explains


class Log(NamedTuple):
    """Rows.

    Attributes:
        ids, numbers: features. probability, label: by task.
        groups: tasks whose labels depend on the same features, and on no feature of another group.
        weight: of each task's loss.
    """

    ids: dict[str, Array]
    numbers: dict[str, Array]
    probability: dict[str, Array]
    label: dict[str, Array]
    groups: tuple[tuple[str, ...], ...]
    weight: dict[str, float]


def groups(seed: int, rows: int) -> Log:
    """Four tasks: a_1 and a_2 depend on how far a sum over features a is from its mean, b_1 and b_2 on a product of ids b."""
    rng = np.random.default_rng(seed)
    ids = drawn_ids(rng, rows, ["a0", "a1", "b0", "b1"], 16)
    numbers = drawn_numbers(rng, rows, ["a_x"])
    shared_a = np.abs(standard(linear(rng, {k: ids[k] for k in ("a0", "a1")}, {"a_x": numbers["a_x"]})))
    shared_b = product(rng, ids["b0"], ids["b1"])
    logits = {}
    for name, shared_N in (("a", shared_a), ("b", shared_b)):
        for number in (1, 2):  # the tasks of a group differ in one effect
            own_N = rng.normal(size=16)[ids[f"{name}{number - 1}"]]
            mixed_N = standard(shared_N) + 0.3 * standard(own_N)
            logits[f"{name}_{number}"] = 3 * standard(mixed_N)
    probability = {task: sigmoid(logit_N) for task, logit_N in logits.items()}
    return log(rng, ids, numbers, probability, (("a_1", "a_2"), ("b_1", "b_2")))


def product_only(seed: int, rows: int) -> Log:
    """One task: its probability is .5 given any one feature; only <v_u, v_w> of ids u and w says more."""
    rng = np.random.default_rng(seed)
    ids = drawn_ids(rng, rows, ["u", "w", "other"], 40)
    probability = {"click": product(rng, ids["u"], ids["w"], 40)}
    return log(rng, ids, drawn_numbers(rng, rows, ["x"]), probability, (("click",),))


def linear_only(seed: int, rows: int) -> Log:
    """Two tasks whose logits are sums of an effect for each id and of a multiple of each number."""
    rng = np.random.default_rng(seed)
    ids = drawn_ids(rng, rows, ["c0", "c1", "c2"], 16)
    numbers = drawn_numbers(rng, rows, ["x0", "x1", "x2"])
    probability = {task: sigmoid(2 * standard(linear(rng, ids, numbers)) - 0.5) for task in ("click", "like")}
    return log(rng, ids, numbers, probability, (("click", "like"),))


def noise(seed: int, rows: int, weight: float = 5.0) -> Log:
    """Two learnable tasks, one linear and one a product, and one of fair coins that weighs `weight` times as much."""
    rng = np.random.default_rng(seed)
    ids = drawn_ids(rng, rows, ["c0", "c1", "u", "w"], 16)
    numbers = drawn_numbers(rng, rows, ["x0", "x1"])
    sum_N = linear(rng, {k: ids[k] for k in ("c0", "c1")}, numbers)
    probability = {
        "click": sigmoid(2 * standard(sum_N) - 0.5), "like": product(rng, ids["u"], ids["w"]), NOISE: np.full(rows, 0.5),
    }  # fmt: skip
    return log(rng, ids, numbers, probability, (("click",), ("like",), (NOISE,)), {NOISE: weight})


def log(
    rng: np.random.Generator, ids: dict[str, Array], numbers: dict[str, Array], probability: dict[str, Array],
    groups: tuple[tuple[str, ...], ...], weight: Mapping[str, float] = {},
) -> Log:  # fmt: skip
    """With labels drawn from their probabilities."""
    label = {task: (rng.random(len(p_N)) < p_N).astype(int) for task, p_N in probability.items()}
    return Log(ids, numbers, probability, label, groups, dict.fromkeys(probability, 1.0) | dict(weight))


def product(rng: np.random.Generator, u_N: Array, w_N: Array, size: int = 16, dims: int = 2) -> Array:
    """Probability .5 + .45 <v_u, v_w> / K with v in {-1, 1}^K, each sign pattern as frequent as the others.

    So the mean over all w is .5 for every u, and the other way round.
    """
    patterns = 2**dims
    assert size % patterns == 0
    signs_PK = 1 - 2 * ((np.arange(patterns)[:, None] >> np.arange(dims)) & 1)
    u_VK, w_VK = (signs_PK[rng.permutation(size) % patterns] for _ in range(2))
    return 0.5 + 0.45 * (u_VK[u_N] * w_VK[w_N]).mean(1)


def linear(rng: np.random.Generator, ids: Mapping[str, Array], numbers: Mapping[str, Array], size: int = 16) -> Array:
    """A sum of an effect for each id and of a multiple of each number."""
    effects = [rng.normal(size=size)[id_N] for id_N in ids.values()]
    return np.sum([*effects, *(rng.choice([-1, 1]) * number_N for number_N in numbers.values())], axis=0)


def drawn_ids(rng: np.random.Generator, rows: int, names: Sequence[str], size: int) -> dict[str, Array]:
    return {name: rng.integers(0, size, rows) for name in names}


def drawn_numbers(rng: np.random.Generator, rows: int, names: Sequence[str]) -> dict[str, Array]:
    return {name: rng.normal(size=rows) for name in names}


def standard(x_N: Array) -> Array:
    return (x_N - x_N.mean()) / x_N.std()


def sigmoid(x_N: Array) -> Array:
    return 1 / (1 + np.exp(-x_N))


def attainable(log: Log) -> dict[str, float]:
    """NE of the probabilities that the labels were drawn from, by task."""
    found = {}
    for task, p_N in log.probability.items():
        y_N, rate = log.label[task], log.label[task].mean()
        loss = -np.mean(np.log(np.where(y_N == 1, p_N, 1 - p_N)))
        found[task] = float(loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))
    return found


def write(log: Log, out: Path, dim: int = 4) -> Path:
    """The log as a dataset: six of ten rows to train on, two for alpha, two that neither sees."""
    schema = Schema.parse(
        {
            "source": {"files": "*.csv", "types": dict.fromkeys(log.label, "int")},
            "dense": {name: {} for name in log.numbers},
            "categorical": {name: {"dim": dim} for name in log.ids},
            "tasks": {
                task: {"kind": "binary", "label": task, "loss_weight": log.weight[task]} for task in log.label
            },
            "split": {"by": "row_index", "modulo": 10, "train": [0, 1, 2, 3, 4, 5], "valid": [6, 7], "test": [8, 9]},
        },
        "planted.yaml",
    )  # fmt: skip
    text = {name: [f"i{i}" for i in id_N] for name, id_N in log.ids.items()}
    text |= {name: [f"{x:.5f}" for x in x_N] for name, x_N in log.numbers.items()}
    text |= {name: [str(y) for y in y_N] for name, y_N in log.label.items()}
    found = parse_text(schema, pl.DataFrame(text, schema=dict.fromkeys(text, pl.String)))
    split_N = found[SPLIT].to_numpy()
    encoders = Encoders.fit(schema, Statistics.of(schema, found.filter(pa.array(split_N == 0))))
    splits = {split: encoders.encode(found.filter(pa.array(split_N == code))) for code, split in enumerate(SPLITS)}
    write_dataset(out, schema, splits, 1000, 4000, encoders)
    return out


def overlap(p_N: Sequence[float], q_N: Sequence[float]) -> float:
    """Share of two selections that is common to both: the sum of the lesser strength of each expert."""
    return float(np.minimum(p_N, q_N).sum())


def two_clusters(strength: Mapping[str, Sequence[float]]) -> tuple[frozenset[str], ...]:
    """The tasks in two clusters by their softmax of beta: those that overlap most on average are merged until two are left."""
    clusters = [frozenset({task}) for task in strength]
    while len(clusters) > 2:

        def closeness(pair: tuple[frozenset[str], frozenset[str]]) -> float:
            return float(np.mean([overlap(strength[i], strength[j]) for i in pair[0] for j in pair[1]]))

        first, second = max(combinations(clusters, 2), key=closeness)
        clusters = [c for c in clusters if c not in (first, second)] + [first | second]
    return tuple(clusters)


def agreement(strength: Mapping[str, Sequence[float]], groups: Sequence[Sequence[str]]) -> float:
    """Share of the pairs of tasks that are together in the clusters as they are in the groups, or apart in both (Rand index).

    Of four tasks in two groups of two, clusters of two by chance have 5/9.
    """
    pairs = list(combinations(strength, 2))
    parts = (two_clusters(strength), groups)
    together = [[any(i in part and j in part for part in parts_) for i, j in pairs] for parts_ in parts]
    return float(np.mean([a == b for a, b in zip(*together, strict=True)]))
