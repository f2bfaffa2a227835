"""Interactions against references in float64 loops, written from the equations, and cases whose answer is known without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, drawn_sizes, load, randomised, rows
from references.loops import Params, mix, softmax
from torch import Tensor

from features.errors import UserError
from models.interaction import INTERACTIONS, Attention, Cross, Dot, Interaction, build_interaction

# Shapes: B rows, D width in, F features, W width of a token, H heads.
sizes = drawn_sizes(
    columns=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    share=st.integers(1, 2),  # W / H
    layers=st.integers(1, 2),
    rank=st.none() | st.integers(1, 4),
)


def columns(size: Sizes) -> dict[str, list[int]]:
    return {f"feature {f}": [c % size.D for c in own] for f, own in enumerate(size.columns)}


def dot(size: Sizes) -> Interaction:
    return randomised(Dot(size.D, columns(size), size.share), size.seed)


def cross(size: Sizes) -> Interaction:
    return randomised(Cross(size.D, size.layers, size.rank), size.seed)


def attention(size: Sizes) -> Interaction:
    made = randomised(Attention(size.D, columns(size), size.heads * size.share, size.layers, size.heads), size.seed)
    with torch.no_grad():
        for weight in made.layers.parameters():
            weight *= 0.3  # scores grow with every layer: without this, rounding shows
    return made


def tokens(params: Params, columns: dict[str, list[int]], x_D: Tensor) -> list[Tensor]:
    """e_f: the columns of each feature through a layer of its own."""
    e_FW = []
    for f, own in enumerate(columns.values()):
        e_W = params["tokens.linear.bias_SH"][f]
        for p, column in enumerate(own):
            e_W = e_W + x_D[column] * params["tokens.linear.weight_SDH"][f, p]
        e_FW.append(e_W)
    return e_FW


def dot_twin(params: Params, columns: dict[str, list[int]], x_BD: Tensor) -> Tensor:
    """Naumov et al. 2019: <e_i, e_j> of all pairs i < j, after the input."""
    outputs = []
    for x_D in x_BD:
        e_FW = tokens(params, columns, x_D)
        pairs = [(i, j) for i in range(len(e_FW)) for j in range(i + 1, len(e_FW))]
        outputs.append(torch.stack([*x_D, *((e_FW[i] * e_FW[j]).sum() for i, j in pairs)]))
    return torch.stack(outputs)


def cross_twin(params: Params, layers: int, rank: int | None, x_BD: Tensor) -> Tensor:
    """Wang et al. 2021, eq. 1 and 2: x_(l+1) = x_0 * (W x_l + b) + x_l, with W = U V^T where there is a rank."""
    outputs = []
    for x_D in x_BD:
        h_D = x_D
        for layer in range(layers):
            if rank is None:
                W_DD, b_D = params[f"layers.{layer}.weight"], params[f"layers.{layer}.bias"]
            else:
                V_DR, U_DR = params[f"layers.{layer}.0.weight"].T, params[f"layers.{layer}.1.weight"]
                W_DD, b_D = U_DR @ V_DR.T, params[f"layers.{layer}.1.bias"]
            h_D = torch.stack([x_D[i] * ((W_DD[i] * h_D).sum() + b_D[i]) + h_D[i] for i in range(len(x_D))])
        outputs.append(h_D)
    return torch.stack(outputs)


def attention_twin(params: Params, columns: dict[str, list[int]], layers: int, heads: int, x_BD: Tensor) -> Tensor:
    """Song et al. 2019, eq. 5-8: each head's softmax of <W_q e_m, W_k e_k> mixes W_v e_k; then relu(mixed + W_res e_m)."""
    outputs = []
    for x_D in x_BD:
        e_FW = tokens(params, columns, x_D)
        for layer in range(layers):
            width, share = len(e_FW[0]), len(e_FW[0]) // heads
            W_q, W_k, W_v, W_res = (params[f"layers.{layer}.weight"][i * width : (i + 1) * width] for i in range(4))
            next_FW = []
            for e_m in e_FW:
                parts = []
                for head in range(heads):
                    own = slice(head * share, (head + 1) * share)
                    scores = [(W_q[own] @ e_m) @ (W_k[own] @ e_k) for e_k in e_FW]
                    parts.append(mix(softmax(scores), [W_v[own] @ e_k for e_k in e_FW]))
                next_FW.append(torch.relu(torch.cat(parts) + W_res @ e_m))
            e_FW = next_FW
        outputs.append(torch.cat([x_D, *e_FW]))
    return torch.stack(outputs)


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_dot_equals_its_reference(size):
    module = dot(size)
    assert module(rows(size)).shape == (size.B, module.out_dim)
    check(module, lambda params, x_BD: dot_twin(params, columns(size), x_BD), rows(size))


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_cross_equals_its_reference_with_full_matrices_and_of_low_rank(size):
    module = cross(size)
    assert module(rows(size)).shape == (size.B, module.out_dim)
    check(module, lambda params, x_BD: cross_twin(params, size.layers, size.rank, x_BD), rows(size))


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_attention_equals_its_reference(size):
    module = attention(size)
    assert module(rows(size)).shape == (size.B, module.out_dim)
    check(module, lambda p, x_BD: attention_twin(p, columns(size), size.layers, size.heads, x_BD), rows(size))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_cross_without_weights_is_the_identity(size):
    module = cross(size)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(module(rows(size)), rows(size))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_a_cross_of_low_rank_is_the_full_one_with_the_product_of_its_matrices(size):
    size.rank = size.rank or 2
    state = {}
    for name, value in (low := cross(size)).state_dict().items():
        layer = name.split(".")[1]
        if name.endswith("1.weight"):
            state[f"layers.{layer}.weight"] = value @ low.state_dict()[f"layers.{layer}.0.weight"]
        elif name.endswith("bias"):
            state[f"layers.{layer}.bias"] = value
    close(load(Cross(size.D, size.layers), state)(rows(size)), low(rows(size)))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_a_cross_of_some_layers_is_a_polynomial_of_one_degree_more(size):
    module, scale_S = cross(size), torch.arange(1.0, size.layers + 4, dtype=torch.float64)
    with torch.no_grad():
        y_SBD = torch.stack([module(scale * rows(size)) for scale in scale_S])
        power_SP = scale_S.unsqueeze(1) ** torch.arange(size.layers + 2)  # degrees 0 to layers + 1
        fitted_PX = torch.linalg.lstsq(power_SP, y_SBD.flatten(1)).solution
    error = (power_SP @ fitted_PX - y_SBD.flatten(1)).abs().max()
    assert error <= 1e-8 * y_SBD.abs().max()
    assert fitted_PX[0].abs().max() <= 1e-6 * y_SBD.abs().max()  # nothing comes of nothing


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_products_do_not_depend_on_which_of_two_features_comes_first(size, data):
    order = data.draw(st.permutations(range(len(size.columns))))
    module, names = dot(size), list(columns(size))
    other = Dot(size.D, {names[f]: columns(size)[names[f]] for f in order}, size.share)
    state = {name: value[list(order)] for name, value in module.state_dict().items()}
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    found = {(names[i], names[j]): p for (i, j), p in zip(pairs, module(rows(size))[:, size.D :].T, strict=True)}
    again = load(other, state)(rows(size))[:, size.D :].T
    for (i, j), product_B in zip(pairs, again, strict=True):
        pair = names[order[i]], names[order[j]]
        close(product_B, found[pair if pair in found else pair[::-1]])


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_features_in_another_order_attend_alike(size, data):
    order = list(data.draw(st.permutations(range(len(size.columns)))))
    module, names = attention(size), list(columns(size))
    size.columns = [size.columns[f] for f in order]
    state = {n: v[order] if n.startswith("tokens") else v for n, v in module.state_dict().items()}
    shape = (size.B, len(names), size.heads * size.share)
    token_BFW = module(rows(size))[:, size.D :].view(shape)
    close(load(attention(size), state)(rows(size))[:, size.D :].view(shape), token_BFW[:, order])


@pytest.mark.parametrize("kind", [dot, attention])
def test_what_comes_beside_the_interaction_is_the_input(kind):
    size = Sizes(B=4, D=6, seed=3, columns=[[0, 1], [2], [3, 4]], heads=2, share=2, layers=2)
    assert torch.equal(kind(size)(rows(size))[:, : size.D], rows(size))


def test_one_feature_has_no_pair_and_attends_to_itself():
    size = Sizes(B=4, D=2, seed=3, columns=[[0, 1]], heads=1, share=3, layers=1)
    assert torch.equal(dot(size)(rows(size)), rows(size))
    module = attention(size)
    W_v, W_res = module.get_parameter("layers.0.weight").chunk(4)[2:]
    e_BW = module.tokens(rows(size)).squeeze(1)
    close(module(rows(size))[:, 2:], torch.relu(e_BW @ (W_v + W_res).T))


@pytest.mark.parametrize("name", INTERACTIONS)
def test_interactions_take_autocast_and_learn_something_in_every_parameter(name):
    inputs = SimpleNamespace(out_dim=6, columns={"a": [0, 1], "b": [2], "c": [3, 4, 5]})
    module = build_interaction({"name": name, **({"layers": 2} if name == "cross" else {})}, inputs, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y_BI = module(torch.randn(32, 6, requires_grad=True))
    assert y_BI.isfinite().all()
    y_BI.float().square().sum().backward()
    for parameter, value in module.named_parameters():
        assert value.grad.any(), parameter


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "dott"}, ["model.interaction.name", "dott", "concat, dot, cross, attention"]),
        ({"name": ["dot"]}, ["model.interaction.name", "concat, dot, cross, attention"]),
        ({}, ["model.interaction.name", "None"]),
        ({"name": "concat", "layers": 2}, ["model.interaction.layers", "(interaction concat)"]),
        ({"name": "dot", "heads": 2}, ["model.interaction.heads", "(interaction dot)"]),
        ({"name": "cross"}, ["model.interaction.layers", "(interaction cross)"]),
        ({"name": "cross", "layers": 0}, ["model.interaction.layers", "greater than or equal to 1"]),
        ({"name": "cross", "layers": 2, "rank": 0, "x": 1}, ["model.interaction.rank", "model.interaction.x"]),
        ({"name": "attention", "heads": "two"}, ["model.interaction.heads", "integer"]),
        ({"name": "attention", "heads": 3}, ["model.interaction.heads", "field_dim 4", "multiple of 3"]),
    ],
)
def test_what_an_interaction_does_not_take_is_said_in_one_line(config: dict[str, Any], words: list[str]):
    inputs = SimpleNamespace(out_dim=3, columns={"a": [0, 1], "b": [2]})
    with pytest.raises(UserError) as caught:
        build_interaction(config, inputs, 4)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []
