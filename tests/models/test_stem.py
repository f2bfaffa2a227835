"""STEM-Net against its reference, its sets of embeddings, and what a task's loss reaches."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, check_gates, close, drawn_sizes, randomised, rows, widths
from references.stem import stem as reference
from torch import Tensor
from torchrec import KeyedJaggedTensor

from features.batch import Batch
from features.errors import UserError
from features.schema.schema import Schema
from models.fusion import build_fusion
from models.fusion.stem import STEM
from models.ranker import ModelConfig, Ranker, table_weights

# Shapes: B rows, T tasks, S sets of embeddings, E experts, D width of a set.
SCHEMA = yaml.safe_load("""
source: {files: "*.csv", types: {click: int, buy: int, stay: float}}
tables: {item: {dim: 8, hash: 11}}
dense: {age: {}, price: {piecewise: 2}}
categorical: {user: {dim: 4, hash: 7}, shown: {table: item}}
bag: {met: {table: item, max_length: 3}, topics: {dim: 4, hash: 5}}
tasks:
  click: {kind: binary, label: click}
  buy: {kind: binary, label: buy}
  stay: {kind: regression, label: stay}
split: {by: row_index, modulo: 10, train: [0, 1, 2, 3, 4, 5, 6, 7], valid: [8], test: [9]}
""")
DIMS = {"user": 4, "shown": 8, "met": 8, "topics": 4}
TABLE_OF = {"user": "user", "shown": "item", "met": "item", "topics": "topics"}
ENCODERS = SimpleNamespace(
    edges={"price": [-1.0, 0.0, 1.0]}, labels={}, num_embeddings={"item": 11, "user": 7, "topics": 5}.__getitem__
)
IDS = {"user": [[3], [6], []], "shown": [[2], [10], []], "met": [[], [4, 4, 9], []], "topics": [[1], [4, 0], []]}
count = st.integers(1, 2)
sizes = drawn_sizes(widths=widths, own=count, shared=count, gate=st.lists(st.integers(1, 4), max_size=2))


def build(size: Sizes) -> STEM:
    return randomised(STEM(size.D, size.T, size.widths, size.own, size.shared, size.gate), size.seed)


def sets(size: Sizes) -> Tensor:
    """x_BSD."""
    return rows(size, size.T + 1, size.D)


def batch() -> Batch:
    sparse = KeyedJaggedTensor(
        keys=list(IDS),
        values=torch.tensor([i for own in IDS.values() for row in own for i in row]),
        lengths=torch.tensor([len(row) for own in IDS.values() for row in own]),
    )
    one_BT = torch.ones(3, 3)
    return Batch(sparse, torch.randn(3, 2), one_BT, one_BT.bool(), one_BT, torch.arange(3))


def ranker(schema: dict = SCHEMA, interaction: str = "concat", **fusion: object) -> Ranker:
    torch.manual_seed(2)
    config = ModelConfig(
        fusion={"name": "stem", "widths": [16], **fusion}, interaction={"name": interaction}, tower=[8], numeric_dim=2,
        embedding_std=1.0,
    )  # fmt: skip
    return Ranker(Schema.parse(schema, "small.yaml"), ENCODERS, config, device="cpu")


def tables(model: Ranker) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {table: parameters[name] for table, name in table_weights(model).items()}


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_stem_equals_its_reference(size):
    module, counts = build(size), [size.own] * size.T + [size.shared]

    def twin(params: dict[str, Tensor], x_BSD: Tensor) -> tuple[Tensor, list[Tensor]]:
        return reference(params, x_BSD, counts, len(size.widths), len(size.gate))

    check(module, lambda params, x_BSD: twin(params, x_BSD)[0], sets(size))
    check_gates(module.gates(sets(size)), twin(dict(module.named_parameters()), sets(size))[1])


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_a_task_reads_all_sets_and_its_loss_has_a_gradient_of_exactly_zero_in_those_of_other_tasks(size):
    size.widths, size.gate = [16], []
    module, x_BSD = build(size), sets(size).requires_grad_()
    h_BTH = module(x_BSD)
    for task in range(size.T):
        gradient_BSD = torch.autograd.grad(h_BTH[:, task].square().sum(), x_BSD, retain_graph=True)[0]
        assert [bool(gradient.any()) for gradient in gradient_BSD.unbind(1)] == [
            s in (task, size.T) for s in range(size.T + 1)
        ]
        for s in range(size.T + 1):
            moved_BSD = x_BSD.detach().clone()
            moved_BSD[:, s] += 1
            assert not torch.equal(module(moved_BSD)[:, task], h_BTH[:, task])


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_gates_choose_from_the_experts_of_all_tasks(size):
    (gate_BTE,) = build(size).gates(sets(size))
    assert gate_BTE.shape == (size.B, size.T, size.T * size.own + size.shared)
    assert (gate_BTE >= 0).all()
    close(gate_BTE.sum(2), torch.ones_like(gate_BTE[:, :, 0]))


def test_a_table_has_a_row_of_all_sets_for_each_id():
    assert {table: tuple(weight.shape) for table, weight in tables(ranker()).items()} == {
        "user": (7, 4 * 4), "item": (11, 8 * 4), "topics": (5, 4 * 4),
    }  # fmt: skip
    assert {table.name: table.embedding_dim for table in ranker().tables} == {"user": 16, "item": 32, "topics": 16}


def test_each_set_has_its_part_of_every_row_and_the_same_numbers():
    model, given = ranker(), batch()
    x_BSD, weight = model.inputs(given), tables(model)
    assert x_BSD.shape == (3, 4, sum(DIMS.values()) + 2 + 2)
    for row in range(3):
        for s in range(4):
            wanted = []
            for feature, dim in DIMS.items():
                items = [weight[TABLE_OF[feature]][i][s * dim : (s + 1) * dim] for i in IDS[feature][row]]
                wanted += (sum(items) / len(items)).tolist() if items else [0.0] * dim
            assert x_BSD[row, s, :24].tolist() == pytest.approx(wanted, abs=1e-6)
            assert torch.equal(x_BSD[row, s, 24:26], given.dense_BD[row])
            assert torch.equal(x_BSD[row, s, 26:], x_BSD[row, 0, 26:])
    assert model.numbers.columns["topics"] == [20, 21, 22, 23]  # of one set
    # As products of a network a set read it.
    assert x_BSD.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("task", range(3))
def test_a_tasks_loss_trains_its_own_part_and_the_shared_one_of_the_rows_of_all_tables(task):
    model = ranker()
    model(batch())[:, task].square().sum().backward()
    for name, weight in tables(model).items():
        used = sorted({i for feature, own in IDS.items() if TABLE_OF[feature] == name for row in own for i in row})
        gradient_RSD = weight.grad.unflatten(1, (4, -1))
        for s in range(4):
            trained = gradient_RSD[:, s].any(1).nonzero().flatten().tolist()
            assert trained == (used if s in (task, 3) else [])


def test_codes_of_numbers_learn_from_every_task():
    for task in range(3):
        model = ranker()
        model(batch())[:, task].square().sum().backward()
        assert model.numbers.code.linear.weight_SDH.grad.any()


def test_stem_of_one_task_has_its_own_and_the_shared_set():
    one = SCHEMA | {"tasks": {"click": SCHEMA["tasks"]["click"]}}
    model = ranker(one)
    assert {table.name: table.embedding_dim for table in model.tables} == {"user": 8, "item": 16, "topics": 8}
    assert model(batch()).shape == (3, 1)


def test_sequences_are_refused():
    bags = {"bag": {"met": {"table": "item", "max_length": 3, "pooling": "sequence"}}}
    with pytest.raises(UserError, match=r"^bag met: fusion stem reads no sequences; set pooling: mean, or choose"):
        ranker(SCHEMA | bags)


def test_stem_reads_features_before_any_interaction():
    with pytest.raises(UserError, match=r"^model\.interaction: fusion stem reads the features themselves, use concat$"):
        ranker(interaction="dot")


@pytest.mark.parametrize("changes", [{"task_experts": 0}, {"shared_experts": 0}, {"widths": []}])
def test_what_stem_does_not_take_is_said_in_one_line(changes):
    with pytest.raises(UserError, match=rf"^model\.fusion\.{next(iter(changes))}: [^\n]*$"):
        build_fusion({"name": "stem", "widths": [4]} | changes, 5, ["a", "b"], [])
