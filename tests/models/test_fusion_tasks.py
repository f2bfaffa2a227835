"""What fusions are told of a schema's tasks, up to the model that is built of it."""

import pytest
import yaml
from dataset_from_rows import parse_text
from polars import DataFrame

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import Schema
from models.fusion.tasks import TaskInfo, task_infos
from models.ranker import ModelConfig, Ranker

SCHEMA = """
source: {files: "*.csv", types: {click: int, cart: int, buy: int, rating: float, seconds: float}}
categorical: {user: {dim: 4}}
tasks:
  click: {kind: binary, label: click}
  cart: {kind: binary, label: cart, given: click}
  buy: {kind: binary, label: buy, given: cart, observed_when: click = 1}
  paid: {kind: binary, label: buy = 1, observed_when: click = 1}
  liked: {kind: binary, label: rating > 3, observed_when: rating IS NOT NULL}
  disliked: {kind: binary, label: rating < 2, observed_when: seconds > 5}
  dwell: {kind: regression, label: seconds, observed_when: click = 1}
split: {by: row_index, modulo: 2, train: [0], valid: [1], test: []}
"""


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema.parse(yaml.safe_load(SCHEMA), "shop.yaml")


def test_a_task_that_reads_another_ones_label_without_given_is_known_as_such(schema: Schema):
    assert task_infos(schema.tasks) == [
        TaskInfo("click"),
        TaskInfo("cart", given="click"),
        TaskInfo("buy", given="cart"),  # and so given click, which it may read
        TaskInfo("paid", undeclared=("click",)),
        TaskInfo("liked"),  # its own label is disliked's as well
        TaskInfo("disliked", undeclared=("dwell",)),
        TaskInfo("dwell", "regression", undeclared=("click",)),
    ]


def test_a_condition_that_is_not_trained_is_still_known(schema: Schema):
    assert task_infos(schema.only(["buy", "cart"]).tasks)[0] == TaskInfo("cart", given="click")


def test_a_ranker_refuses_a_calibrator_over_what_has_no_probability_over_all_rows(schema: Schema):
    rows = DataFrame({"user": ["a", "b"], "click": ["1", "0"], "cart": ["1", "0"], "buy": ["1", "0"],
                      "rating": ["4", "1"], "seconds": ["9", "3"]})  # fmt: skip
    found = parse_text(schema, rows)
    encoders = Encoders.fit(schema, Statistics.of(schema, found))

    def ranker(*chain: str) -> Ranker:
        fusion = {"name": "aitm", "widths": [4], "calibrator": 0.6, "chain": list(chain) or None}
        return Ranker(schema, encoders, ModelConfig(fusion=fusion))

    assert ranker("click", "cart", "buy").fusion.condition_CT.sum(1).tolist() == [1, 2, 3]
    for chain, message in (
        (("click", "paid"), "task paid .*given: click"),
        ((), "paid"),
        (("dwell",), "dwell is of kind"),
    ):
        with pytest.raises(UserError, match=f"^model.fusion.calibrator: .*{message}"):
            ranker(*chain)
