"""Means of bags: divided one by one on a CPU, together on any other device, with the same numbers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import JaggedTensor

from features.batch import Rows
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from models.ranker import ModelConfig, Ranker, bag_means
from models.sequences import mean_pooled

WIDTHS = [4, 8, 4, 4, 8, 4]


class Divisions(TorchDispatchMode):
    """Counts divisions of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is torch.ops.aten.div
        return func(*args, **(kwargs or {}))


def test_bags_that_are_divided_together_have_the_means_and_gradients_of_those_divided_alone() -> None:
    torch.manual_seed(0)
    sums = {f"b{i}": torch.randn(9, width, requires_grad=True) for i, width in enumerate(WIDTHS)}
    length = {name: torch.randint(1, 7, (9, 1), dtype=torch.int32) for name in sums}
    slopes = {name: torch.randn_like(sum_BW) for name, sum_BW in sums.items()}

    def found(together: bool) -> list[Tensor]:
        means = bag_means(sums, length, together)
        total = torch.stack([(means[name] * slopes[name]).sum() for name in sums]).sum()
        return [*(means[name] for name in sums), *torch.autograd.grad(total, list(sums.values()))]

    assert all(map(torch.equal, found(True), found(False)))
    assert torch.equal(found(True)[1], sums["b1"] / length["b1"])


def test_a_device_divides_once_a_width_forward_and_backward_and_not_once_a_bag() -> None:
    content = {
        "source": {"files": "*.csv"},
        "categorical": {"c": {"hash": 9, "dim": 4}},
        "bag": {f"b{i}": {"hash": 9, "dim": width} for i, width in enumerate(WIDTHS)},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "split": {"by": "hash", "key": "k", "valid": 0.1, "test": 0.1},
    }
    schema = Schema.parse(content, "bags.yaml")
    ranker = Ranker(
        schema,
        Encoders(schema, {}, {}, {}),
        ModelConfig(fusion={"name": "shared_bottom", "widths": [2]}),
        device="meta",
    )
    batch = Rows.blank(schema, 5).batch(schema, 5).to(torch.device("meta"))
    with Divisions() as forward:
        embedding_BE = ranker.embedded(batch)
    assert embedding_BE.shape == (5, 4 + sum(WIDTHS))
    with Divisions() as backward:
        embedding_BE.sum().backward()
    assert forward.count == backward.count == len(set(WIDTHS))


def test_the_sum_of_items_is_not_checked_against_their_lengths_for_which_a_gpu_would_be_waited_for() -> None:
    items = JaggedTensor(torch.ones(5, 2), lengths=torch.tensor([2, 0, 2]))
    assert mean_pooled({"b": items}, {})["b"].tolist() == [[1, 1], [0, 0], [1, 1]]
