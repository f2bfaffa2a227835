"""PEPNet against its reference, and what must hold of its gates without one."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, check_gates, close, drawn_sizes, load, randomised, rows, widths
from references.pepnet import pepnet as reference
from torch import Tensor

from features.errors import UserError
from features.schema.schema import Schema
from models.fusion import build_fusion
from models.fusion.pepnet import PEPNet
from models.fusion.single_task import SingleTask
from models.ranker import ModelConfig, Ranker

# Shapes: B rows, T tasks, L hidden layers, D width in, H width of a layer.
SCHEMA = yaml.safe_load("""
source: {files: "*.csv", types: {click: int, buy: int}}
tables: {item: {dim: 4, hash: 11}}
dense: {age: {missing_flag: true}}
categorical: {user: {dim: 4, hash: 7}, shown: {table: item}, device: {dim: 8, hash: 5}}
bag: {met: {table: item, max_length: 3}}
tasks: {click: {kind: binary, label: click}, buy: {kind: binary, label: buy}}
split: {by: row_index, modulo: 10, train: [0, 1, 2, 3, 4, 5, 6, 7], valid: [8], test: [9]}
""")
ENCODERS = SimpleNamespace(edges={}, labels={}, num_embeddings={"item": 11, "user": 7, "device": 5}.__getitem__)
fields = st.none() | st.lists(st.integers(0, 2), unique=True, max_size=3)
sizes = drawn_sizes(widths=widths, priors=fields, domains=fields, hidden=st.integers(1, 4))


def columns(size: Sizes) -> list[list[int]]:
    """Of three features, one column each and the rest, not in their order."""
    order = [(3 * column + 1) % size.D for column in range(size.D)] if size.D % 3 else list(range(size.D))
    return [order[:1], order[1:2], order[2:]]


def build(size: Sizes) -> PEPNet:
    inner = (columns(size), size.widths, size.priors, size.domains, size.hidden)
    return randomised(PEPNet(size.D, size.T, *inner), size.seed)


def read(size: Sizes, chosen: list[int] | None) -> list[int]:
    return [column for field in chosen or [] for column in columns(size)[field]]


def small(**changes: object) -> Sizes:
    common = {"B": 4, "D": 7, "T": 3, "seed": 3, "widths": [6, 4], "priors": [2], "domains": [0], "hidden": 8}
    return Sizes(**(common | changes))


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_pepnet_equals_its_reference(size):
    module, chosen = build(size), (read(size, size.priors), read(size, size.domains))

    def twin(params: dict[str, Tensor], x_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        return reference(params, x_BD, size.T, size.widths, *chosen)

    if size.domains and not chosen[1]:
        return  # features without columns, which a schema has not
    check(module, lambda params, x_BD: twin(params, x_BD)[0], rows(size))
    check_gates(module.gates(rows(size)), twin(dict(module.named_parameters()), rows(size))[1])


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_before_training_pepnet_is_a_plain_network_a_task(size):
    module = PEPNet(size.D, size.T, columns(size), size.widths, size.priors, None, size.hidden).double()
    state = {
        f"networks.layers.{name.split('.')[1]}.{name.split('.')[-1]}": value
        for name, value in module.state_dict().items()
        if name.startswith("networks.")
    }
    close(module(rows(size)), load(SingleTask(size.D, size.T, size.widths), state)(rows(size)))
    close(module.gates(rows(size))[0], torch.ones(size.B, size.T, len(size.widths), dtype=torch.float64))


def test_gates_read_all_of_the_input_and_pass_a_gradient_to_priors_and_domains_only():
    size = small()
    module, x_BD = build(size), rows(size).requires_grad_()
    for unit, chosen in ((module.epnet, size.domains), (module.ppnet[0], size.priors)):
        own = []  # what a gate's gradient reaches
        hook = unit.register_forward_hook(lambda _, __, gate, own=own: own.append(gate))
        module(x_BD)
        hook.remove()
        reached_BD = torch.autograd.grad(own[0].square().sum(), x_BD, retain_graph=True)[0]
        assert reached_BD.any(0).nonzero().flatten().tolist() == sorted(read(size, chosen))
        for column in range(size.D):
            moved_BD = x_BD.detach().clone()
            moved_BD[:, column] += 1
            again = []
            hook = unit.register_forward_hook(lambda _, __, gate, again=again: again.append(gate))
            module(moved_BD)
            hook.remove()
            assert not torch.isclose(again[0], own[0]).all()


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_gates_stay_between_zero_and_two(size):
    (gate_BTL,) = build(size).gates(1e3 * rows(size))
    assert gate_BTL.shape == (size.B, size.T, len(size.widths))
    assert ((gate_BTL >= 0) & (gate_BTL <= 2)).all()


def test_a_row_does_not_depend_on_the_others():
    module, x_BD = build(small()), rows(small())
    close(torch.cat([module(x_1D) for x_1D in x_BD.split(1)]), module(x_BD))


def ranker(interaction: str = "concat", **fusion: object) -> Ranker:
    config = {"fusion": {"name": "pepnet", "widths": [6], **fusion}, "interaction": {"name": interaction}}
    return Ranker(Schema.parse(SCHEMA, "small.yaml"), ENCODERS, ModelConfig(**config), device="cpu")


def test_priors_and_domains_are_the_columns_of_the_features_that_are_named():
    # user 0-3, shown 4-7, device 8-15, met 16-19, age and its flag 20-21.
    fusion = ranker(priors=["device", "user"], domains=["age"]).fusion
    assert fusion.prior_P.tolist() == [*range(8, 16), *range(4)]
    assert fusion.domain_P.tolist() == [20, 21]


def test_all_of_its_gates_and_the_first_layers_of_its_networks_read_features():
    model = ranker(priors=["user"], domains=["device"], widths=[6, 4])
    reads = {n for n, value in model.fusion.state_dict().items() if model.reads_features(f"fusion.{n}", value.shape)}
    assert {n for n in model.fusion.state_dict() if n not in reads} == {
        "networks.0.layers.0.bias_SH", "networks.1.layers.0.weight_SDH", "networks.1.layers.0.bias_SH",
    }  # fmt: skip


def test_pepnet_reads_features_before_any_interaction():
    with pytest.raises(
        UserError, match=r"^model\.interaction: fusion pepnet reads the features themselves, use concat$"
    ):
        ranker("dot")


@pytest.mark.parametrize(("changes", "words"), [
    ({"priors": ["a", "e"]}, "model.fusion.priors: e is not one of a, b"),
    ({"domains": ["b", "b"]}, "model.fusion.domains: names a feature twice"),
    ({"hidden": 0}, "model.fusion.hidden: "), ({"widths": []}, "model.fusion.widths: "),
    ({"widths": [0]}, "model.fusion.widths: "),
])  # fmt: skip
def test_what_pepnet_does_not_take_is_said_in_one_line(changes, words):
    with pytest.raises(UserError) as caught:
        build_fusion({"name": "pepnet", "widths": [4]} | changes, 3, ["t"], ["a", "b"], columns=[[0], [1, 2]])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
