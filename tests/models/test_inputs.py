"""What a row's tables and numbers become, against plain loops in float64."""

from types import SimpleNamespace

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import check, close, drawn_sizes, randomised, rows
from torch import Tensor

from features.schema.schema import Schema
from models.inputs import Inputs, Piecewise, Tokens

# Shapes: B rows, D flat width, F features, N numbers with a code, K bins, W width of a code or token.
numbers = st.lists(
    st.lists(st.integers(-8, 8), min_size=2, max_size=6, unique=True).map(sorted),
    min_size=1, max_size=4,
)  # fmt: skip
sizes = drawn_sizes(
    numbers=numbers, columns=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4).filter(any)
)


def code(edges: list[float], x: float) -> list[float]:
    """How far one number is through each of its bins."""
    bins = zip(edges, edges[1:], strict=False)
    return [0.0 if x <= low else 1.0 if x >= high else (x - low) / (high - low) for low, high in bins]


def piecewise(edges: list[list[float]], params: dict[str, Tensor], x_BN: Tensor) -> Tensor:
    outputs = []
    for x_N in x_BN.detach():
        code_NW = []
        for n, x in enumerate(x_N):
            code_W = params["linear.bias_SH"][n]
            for k, share in enumerate(code(edges[n], x.item())):
                code_W = code_W + share * params["linear.weight_SDH"][n, k]
            code_NW.append(torch.relu(code_W))
        outputs.append(torch.stack(code_NW))
    return torch.stack(outputs)


def tokens(columns: list[list[int]], params: dict[str, Tensor], x_BD: Tensor) -> Tensor:
    outputs = []
    for x_D in x_BD:
        token_FW = []
        for f, own in enumerate(columns):
            token_W = params["linear.bias_SH"][f]
            for p, column in enumerate(own):
                token_W = token_W + x_D[column] * params["linear.weight_SDH"][f, p]
            token_FW.append(token_W)
        outputs.append(torch.stack(token_FW))
    return torch.stack(outputs)


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.data())
def test_codes_of_numbers_within_beyond_and_on_their_edges_equal_a_loop_forward_and_backward(size, data):
    edges = [[float(e) for e in own] for own in size.numbers]
    x_BN = torch.tensor(
        [[data.draw(st.floats(-12, 12) | st.sampled_from(own)) for own in edges] for _ in range(size.B)],
        dtype=torch.float64,
    )
    module = randomised(Piecewise(edges, size.D), size.seed)
    close(module(x_BN), piecewise(edges, dict(module.named_parameters()), x_BN))
    probe_BNW = rows(size, len(edges), size.D)
    gradients = [
        torch.autograd.grad((code_BNW * probe_BNW).sum(), list(module.parameters()))
        for code_BNW in (module(x_BN), piecewise(edges, dict(module.named_parameters()), x_BN))
    ]
    for real, loop in zip(*gradients, strict=True):
        close(real, loop)


@pytest.mark.parametrize(
    ("x", "expected"),
    [(-5, [0, 0, 0]), (0, [0, 0, 0]), (0.5, [0.5, 0, 0]), (1, [1, 0, 0]), (2, [1, 0.5, 0]), (9, [1, 1, 1])],
)
def test_a_code_by_hand_beside_a_number_of_fewer_bins(x, expected):
    module = Piecewise([[0, 1, 3, 4], [0, 1]], 3)
    with torch.no_grad():
        module.linear.weight_SDH.copy_(torch.eye(3).expand(2, 3, 3))
        module.linear.bias_SH.zero_()
    assert module(torch.tensor([[x, 0.25]])).tolist() == [[expected, [0.25, 0, 0]]]


def test_codes_stay_finite_where_edges_are_one_in_float32():
    module = Piecewise([[1e9, 1e9 + 1, 1e9 + 1000]], 4)
    assert module(torch.tensor([[1e9], [0.0], [1e9 + 1000]])).isfinite().all()


def test_weights_of_bins_that_a_number_does_not_have_learn_nothing():
    module = Piecewise([[0, 1, 2, 3], [0, 1]], 2)
    torch.nn.init.ones_(module.linear.bias_SH)
    module(torch.tensor([[2.5, 7.0], [-3.0, 0.5], [0.5, -4.0], [1.5, 0.9]])).square().sum().backward()
    assert module.linear.weight_SDH.grad[0].any(1).all()
    assert module.linear.weight_SDH.grad[1].any(1).tolist() == [True, False, False]


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_tokens_equal_a_loop_forward_and_backward(size):
    columns = [[c % size.D for c in own] for own in size.columns]
    module = randomised(Tokens({f"f{f}": own for f, own in enumerate(columns)}, size.D, 3), size.seed)
    check(module, lambda params, x_BD: tokens(columns, params, x_BD), rows(size))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_a_token_does_not_depend_on_columns_of_other_features(size, data):
    columns = [[c % size.D for c in own] for own in size.columns]
    module = randomised(Tokens({f"f{f}": own for f, own in enumerate(columns)}, size.D, 3), size.seed)
    column, x_BD = data.draw(st.integers(0, size.D - 1)), rows(size)
    before = module(x_BD)
    x_BD[:, column] += 1
    same = [
        torch.equal(token_BW, old_BW) for token_BW, old_BW in zip(module(x_BD).unbind(1), before.unbind(1), strict=True)
    ]
    assert same == [column not in own for own in columns]


def test_a_token_starts_within_the_bound_of_its_own_width():
    widths = {"a": 1, "b": 4, "c": 64}
    places = iter(range(sum(widths.values())))
    module = Tokens({name: [next(places) for _ in range(n)] for name, n in widths.items()}, sum(widths.values()), 500)
    for f, n in enumerate(widths.values()):
        for value in (module.linear.weight_SDH[f, :n], module.linear.bias_SH[f]):
            assert value.abs().max() <= n**-0.5
            assert value.abs().max() > 0.97 * n**-0.5
            assert value.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.1)


def schema(**piecewise_bins: int) -> Schema:
    """Two tables of other widths, one of them shared with a bag, and three numbers, one with a missing flag."""
    dense = {"age": {"missing_flag": True}, "price": {}, "size": {}}
    content = {
        "source": {"files": "*.csv", "types": {"click": "int"}},
        "tables": {"item": {"dim": 8, "hash": 7}},
        "dense": {name: own | {"piecewise": piecewise_bins.get(name)} for name, own in dense.items()},
        "categorical": {"user": {"dim": 4}, "shown": {"table": "item"}},
        "bag": {"recent": {"table": "item"}},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "split": {"by": "row_index", "modulo": 3, "train": [0], "valid": [1], "test": [2]},
    }
    return Schema.parse(content, "mine.yaml")


def test_numbers_without_a_code_stand_behind_the_embeddings_as_they_are():
    module = Inputs(schema(), SimpleNamespace(edges={}), 4)
    embedding_BE, dense_BD = torch.randn(5, 20), torch.randn(5, 4)
    assert torch.equal(module(embedding_BE, dense_BD), torch.cat([embedding_BE, dense_BD], 1))
    assert module.out_dim == 24
    assert module.columns == {
        "user": [*range(4)], "shown": [*range(4, 12)], "recent": [*range(12, 20)],
        "age": [20, 21], "price": [22], "size": [23],
    }  # fmt: skip


def test_coded_numbers_come_last_and_keep_their_missing_flag():
    edges = {"age": [0.0, 1.0, 2.0], "size": [-1.0, 1.0]}
    made = schema(age=3, size=2)
    module = Inputs(made, SimpleNamespace(edges=edges), 4).double()
    embedding_BE, dense_BD = torch.randn(5, 20).double(), torch.randn(5, 4).double()
    x_BD = module(embedding_BE, dense_BD)
    assert made.dense_ranges == {"age": range(0, 2), "price": range(2, 3), "size": range(3, 4)}
    assert module.out_dim == 20 + 4 + 8
    assert module.columns == {
        "user": [*range(4)], "shown": [*range(4, 12)], "recent": [*range(12, 20)],
        "age": [20, 24, 25, 26, 27, 21], "price": [22], "size": [23, 28, 29, 30, 31],
    }  # fmt: skip
    params = dict(module.code.named_parameters())
    code_BNW = piecewise(list(edges.values()), params, dense_BD[:, [0, 3]])
    close(x_BD, torch.cat([embedding_BE, dense_BD, code_BNW.flatten(1)], 1))


@pytest.mark.parametrize("bins", [{}, {"price": 1}, {"age": 1}])
def test_every_column_of_the_input_belongs_to_one_feature(bins):
    module = Inputs(schema(**bins), SimpleNamespace(edges={name: [0.0, 1.0] for name in bins}), 4)
    assert sorted(c for own in module.columns.values() for c in own) == list(range(module.out_dim))
    assert list(module.columns) == ["user", "shown", "recent", "age", "price", "size"]
