"""Fusions and towers against their references in float64, and cases whose answer is known without one."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, drawn_sizes, load, randomised, rows, widths
from references import experts
from references.layers import Towers, copy_parts, mlp_pairs, mlps
from small_architecture import INTERACTIONS, small_supernet, with_architecture
from torch import Tensor
from torchrec import KeyedJaggedTensor

from features.batch import Batch
from features.errors import UserError
from features.schema.schema import Schema
from models.fusion import build_fusion
from models.fusion.adatt import AdaTT
from models.fusion.mmoe import MMoE
from models.fusion.ple import PLE
from models.fusion.shared_bottom import SharedBottom
from models.ranker import ModelConfig, Ranker
from models.towers import TaskTowers

# Shapes: B rows, T tasks, U units (the tasks, then the shared one), S networks side by side, E experts, D width.
sizes = drawn_sizes(
    levels=st.lists(widths, min_size=1, max_size=3),
    experts=st.integers(1, 3),
    shared=st.integers(0, 3),
    native=st.booleans(),
)


def mmoe(size: Sizes) -> MMoE:
    return randomised(MMoE(size.D, size.T, size.experts, size.levels), size.seed)


def ple(size: Sizes) -> PLE:
    return randomised(PLE(size.D, size.T, size.levels, size.experts, size.shared), size.seed)


def adatt(size: Sizes) -> AdaTT:
    return randomised(AdaTT(size.D, size.T, size.levels, size.experts, size.shared, size.native), size.seed)


@settings(max_examples=examples(60), deadline=None)
@given(sizes, widths)
def test_shared_bottom_equals_its_reference(size, widths):
    module = randomised(SharedBottom(size.D, size.T, widths), size.seed)
    check(module, experts.SharedBottom(size.D, size.T, widths), rows(size))


@settings(max_examples=examples(100), deadline=None)
@given(sizes)
def test_mmoe_equals_its_reference(size):
    check(mmoe(size), experts.MMoE(size.D, size.T, size.experts, size.levels), rows(size))


@settings(max_examples=examples(100), deadline=None)
@given(sizes)
def test_ple_equals_its_reference(size):
    check(ple(size), experts.PLE(size.D, size.T, size.levels, size.experts, size.shared), rows(size))


@settings(max_examples=examples(100), deadline=None)
@given(sizes)
def test_adatt_equals_its_reference(size):
    check(adatt(size), experts.AdaTT(size.D, size.T, size.levels, size.experts, size.shared, size.native), rows(size))


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.lists(st.integers(1, 5), max_size=3), st.integers(1, 3))
def test_towers_equal_their_reference(size, widths, outputs):
    module = randomised(TaskTowers(size.T, size.D, widths, outputs=outputs), size.seed)
    h_BTD = rows(size, size.T * size.D).view(size.B, size.T, size.D)
    assert module(h_BTD).shape == (outputs, size.B, size.T)
    check(module, Towers(size.T, size.D, widths, shared=False, outputs=outputs), h_BTD)


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_ple_of_one_task_is_adatt_without_the_native_residual(size):
    size.T, size.native = 1, False
    module = ple(size)
    close(module(rows(size)), load(adatt(size), module.state_dict())(rows(size)))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, widths)
def test_adatt_of_one_level_without_the_native_residual_is_mmoe(size, widths):
    size.levels, size.native = [widths], False
    module = adatt(size)
    state = {}
    for name, value in module.state_dict().items():
        state[name.replace("levels.0.experts", "experts.0").replace("levels.0.gate", "gate.0")] = value
    other = MMoE(size.D, size.T, size.T * size.experts + size.shared, size.levels)
    close(module(rows(size)), load(other, state)(rows(size)))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, widths)
def test_adatt_with_zero_gates_and_one_expert_a_task_adds_the_mean_of_all_to_the_own(size, widths):
    size.levels, size.experts, size.native = [widths], 1, True
    module = adatt(size)
    with torch.no_grad():
        module.get_parameter("levels.0.gate.weight_SDH").zero_()
    x_BD, networks = rows(size), mlps(size.T + size.shared, [size.D, *widths]).double()
    copy_parts(mlp_pairs(networks, module.get_submodule("levels.0.experts")))
    expert_EBD = torch.stack([network(x_BD) for network in networks])
    close(module(x_BD), (expert_EBD[: size.T] + expert_EBD.mean(0)).transpose(0, 1))


def test_adatt_of_two_tasks_equals_a_calculation_by_hand():
    module = AdaTT(1, 2, [[1]], 1, 0, True).double()
    module.load_state_dict(
        {
            "levels.0.experts.layers.0.weight_SDH": torch.tensor([[[2.0]], [[3.0]]]),
            "levels.0.experts.layers.0.bias_SH": torch.tensor([[1.0], [-1.0]]),
            # At x = 1: 1/4 and 3/4 for the first task, 1/2 and 1/2 for the second.
            "levels.0.gate.weight_SDH": torch.tensor([[[1.0, 3.0]], [[1.0, 1.0]]], dtype=torch.float64).log(),
        }
    )
    # Experts: 2 + 1 = 3 and 3 - 1 = 2.
    expected = [[[3 / 4 + 2 * 3 / 4 + 3], [3 / 2 + 2 / 2 + 2]]]
    close(module(torch.ones(1, 1, dtype=torch.float64)), torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, widths)
def test_mmoe_of_one_expert_gives_it_to_every_task(size, widths):
    size.experts, size.levels = 1, [widths]
    module = mmoe(size)
    state = {k.replace("experts.0", "bottom"): v for k, v in module.state_dict().items() if "gate" not in k}
    close(module(rows(size)), load(SharedBottom(size.D, size.T, widths), state)(rows(size)))


def permuted(params: Mapping[str, Tensor], tasks: list[int], experts: int) -> dict[str, Tensor]:
    """The parameters of the same network with its tasks in another order: its task t is the former task tasks[t]."""
    state = {}
    for name, value in params.items():
        level = name.split(".")[1]
        users, _, total = params[f"levels.{level}.gate.weight_SDH"].shape
        unit_U = [*tasks, *range(len(tasks), users)]
        expert_E = [t * experts + i for t in tasks for i in range(experts)]
        expert_E += range(len(expert_E), total)
        if ".experts." in name:
            state[name] = value[expert_E]
        elif ".gate." in name:
            state[name] = value[unit_U][:, :, expert_E]
        else:
            state[name] = value[unit_U][:, expert_E]
    return state


@pytest.mark.parametrize("build", [ple, adatt])
@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_tasks_in_another_order_give_outputs_in_that_order(build, size, data):
    tasks = data.draw(st.permutations(range(size.T)))
    module = build(size)
    other = load(build(size), permuted(module.state_dict(), tasks, size.experts))
    close(other(rows(size)), module(rows(size))[:, tasks])


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_tasks_of_mmoe_in_another_order_give_outputs_in_that_order(size, data):
    tasks = data.draw(st.permutations(range(size.T)))
    module = mmoe(size)
    state = module.state_dict()
    last = f"gate.{len(size.levels) - 1}.weight_SDH"
    other = load(mmoe(size), state | {last: state[last][tasks]})
    close(other(rows(size)), module(rows(size))[:, tasks])


def units(size: Sizes) -> list[int]:
    """How many units mix experts, by level."""
    return [size.T + bool(size.shared)] * (len(size.levels) - 1) + [size.T]


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_gates_of_mmoe_sum_to_one(size):
    gates = mmoe(size).gates(rows(size))
    takers = [size.experts] * (len(size.levels) - 1) + [size.T]
    assert [gate.shape for gate in gates] == [(size.B, users, size.experts) for users in takers]
    for gate_BUE in gates:
        assert (gate_BUE >= 0).all()
        close(gate_BUE.sum(2), torch.ones_like(gate_BUE[:, :, 0]))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_gates_of_ple_sum_to_one_and_are_exactly_zero_on_what_is_hidden(size):
    own = size.T * size.experts
    gates = ple(size).gates(rows(size))
    assert [gate.shape for gate in gates] == [(size.B, users, own + size.shared) for users in units(size)]
    for gate_BUE in gates:
        assert (gate_BUE >= 0).all()
        close(gate_BUE.sum(2), torch.ones_like(gate_BUE[:, :, 0]))
        for t in range(size.T):
            hidden = [e for e in range(own) if e // size.experts != t]
            assert (gate_BUE[:, t, hidden] == 0).all()


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_gates_of_adatt_sum_to_one_plus_the_native_weights(size):
    module = adatt(size)
    gates = module.gates(rows(size))
    assert [gate.shape for gate in gates] == [
        (size.B, users, size.T * size.experts + size.shared) for users in units(size)
    ]
    for level, gate_BUE in enumerate(gates):
        for u in range(gate_BUE.shape[1]):
            first, count = u * size.experts, size.experts if u < size.T else size.shared
            native = 0.0
            if size.native and count == 1:
                native = 1.0
            elif size.native:
                native = module.get_parameter(f"levels.{level}.native_OE")[u, first : first + count].sum().item()
            close(gate_BUE[:, u].sum(1), torch.full_like(gate_BUE[:, u, 0], 1 + native))


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.sampled_from([1e6, -1e6, float("inf"), float("nan")]))
def test_native_weights_outside_a_units_own_learnt_experts_have_no_influence(size, value):
    size.native = True
    module, x_BD = adatt(size), rows(size)
    before = module(x_BD)
    own = experts.AdaTT(size.D, size.T, size.levels, size.experts, size.shared).own
    for name, native_OE in module.named_parameters():
        if name.endswith("native_OE"):
            with torch.no_grad():
                for u in range(len(native_OE)):
                    kept = native_OE[u, list(own(0, u))].clone()
                    native_OE[u] = value
                    if len(own(0, u)) > 1:
                        native_OE[u, list(own(0, u))] = kept
    assert torch.equal(module(x_BD), before)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("native", [False, True])
def test_adatt_learns_native_weights_only_where_a_unit_has_several_experts(experts, shared, native):
    names = {name for name, _ in AdaTT(3, 2, [[4], [2]], experts, shared, native).named_parameters()}
    assert ("levels.0.native_OE" in names) == (native and (experts > 1 or shared > 1))
    assert ("levels.1.native_OE" in names) == (native and experts > 1)


@pytest.mark.parametrize("kind", [MMoE, PLE, AdaTT])
def test_fresh_experts_differ_and_gates_far_out_stay_finite(kind):
    torch.manual_seed(0)
    module = MMoE(4, 3, 5, [[6], [5]]) if kind is MMoE else kind(4, 3, [[6], [5]], 1, 2, *[True] * (kind is AdaTT))
    for name, weight_SDH in module.named_parameters():
        if "experts" in name:
            assert len(weight_SDH.unique(dim=0)) == len(weight_SDH), name
    for gate_BUE in module.gates(torch.full((2, 4), 1e6)):
        assert gate_BUE.isfinite().all()


# Every member, as shipped


SCHEMA = yaml.safe_load("""
source: {files: "*.csv", types: {click: int, buy: int, stay: float}}
tables: {item: {dim: 4, hash: 11}}
dense: {age: {missing_flag: true}, price: {piecewise: 2}}
categorical: {user: {dim: 4, hash: 7}, shown: {table: item}}
bag: {met: {table: item, max_length: 3}}
tasks:
  click: {kind: binary, label: click}
  buy: {kind: binary, label: buy, given: click}
  stay: {kind: regression, label: stay}
split: {by: row_index, modulo: 10, train: [0, 1, 2, 3, 4, 5, 6, 7], valid: [8], test: [9]}
""")
ENCODERS = SimpleNamespace(
    edges={"price": [-1.0, 0.0, 1.0]}, labels={}, num_embeddings={"item": 11, "user": 7}.__getitem__
)
SHIPPED = sorted(path for path in (Path(__file__).parents[2] / "jobs/conf/model").glob("*.yaml") if path.stem != "emm")


def batch(rows: slice = slice(None)) -> Batch:
    """Some of 12 rows, in which every id occurs."""
    rng = torch.Generator().manual_seed(1)
    ids = {"user": [[r % 7] for r in range(12)], "shown": [[r % 11] for r in range(12)]}
    ids["met"] = [[*range(r % 4)] for r in range(12)]
    own = {name: found[rows] for name, found in ids.items()}
    sparse = KeyedJaggedTensor(
        keys=list(ids),
        values=torch.tensor([i for found in own.values() for row in found for i in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for found in own.values() for row in found]),
    )
    dense_BD, one_BT = torch.randn(12, 3, generator=rng)[rows], torch.ones(12, 3)[rows]
    return Batch(sparse, dense_BD, one_BT, one_BT.bool(), one_BT, torch.arange(12)[rows])


WITHOUT_LAYERS = {"levels": [[], [[]], [[8], []], [[0]]], "widths": [[], [0], [-1]]}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_fusion_without_layers_or_units_is_refused(file):
    fusion = yaml.safe_load(file.read_text())["fusion"]
    for key in WITHOUT_LAYERS.keys() & fusion.keys():
        for value in WITHOUT_LAYERS[key]:
            with pytest.raises(UserError, match=rf"model\.fusion\.{key}"):
                build_fusion(fusion | {key: value}, 8, ["a", "b"], ["f", "g"], {}, [[0, 1, 2, 3], [4, 5, 6, 7]])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_model_lists_what_all_models_have(file):
    assert yaml.safe_load(file.read_text()).keys() >= {"fusion", "tower", "dropout", "start", "embedding_std"}


def contents() -> Iterator[Any]:
    """Of every shipped model; of AutoMTL with each kind of interaction."""
    for file in SHIPPED:
        content = yaml.safe_load(file.read_text())
        for interaction in INTERACTIONS if file.stem == "automtl" else [""]:
            settings = with_architecture(content, ["click", "buy", "stay"], interaction)
            yield pytest.param(settings, id=" ".join([file.stem, interaction]).rstrip())


MODELS = [*contents()]
SUPERNET = {"fusion": small_supernet()}


@pytest.mark.parametrize("content", [*MODELS, pytest.param(SUPERNET, id="automtl_supernet")])
def test_no_first_gradient_is_rounding_errors_only_which_adam_would_scale_up_to_full_steps(content):
    torch.manual_seed(4)
    config = ModelConfig.model_validate(content)
    model, given = Ranker(Schema.parse(SCHEMA, "small.yaml"), ENCODERS, config, device="cpu"), batch()
    single, x = model.fusion.eval().requires_grad_(), model.inputs(given).detach()
    double, observed = copy.deepcopy(single).double(), (given.observed_BT,) if model.fusion.reads_observed else ()
    h_BTD = single(x, *observed)
    probe_BTD = torch.randn_like(h_BTD)
    h_BTD.backward(probe_BTD)
    double(x.double(), *observed).backward(probe_BTD.double())
    for (name, one), other in zip(single.named_parameters(), double.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-3 * other.grad.norm(), name


@pytest.mark.parametrize("content", MODELS)
def test_every_shipped_fusion_scores_rows_one_by_one_learns_everywhere_and_can_be_traced(content):
    torch.manual_seed(3)
    config = ModelConfig.model_validate(content)
    model, given = Ranker(Schema.parse(SCHEMA, "small.yaml"), ENCODERS, config, device="cpu"), batch()
    with torch.no_grad():
        for parameter in model.parameters():  # away from gates that start at exactly 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    model(given).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if not parameter.grad.any()} == set()
    model.eval()
    logit_BT, x = model(given), model.inputs(given)
    assert logit_BT.shape == (12, 3)
    torch.testing.assert_close(torch.cat([model(batch(slice(row, row + 1))) for row in range(12)]), logit_BT)
    for weight_BUE in model.fusion.gates(x):
        assert weight_BUE.shape[0] == 12
        assert weight_BUE.ndim == 3
    # TorchRec's pipelined loop traces what it runs.
    traced = torch.fx.symbolic_trace(model.fusion)
    observed = (given.observed_BT,) if model.fusion.reads_observed else ()
    assert torch.equal(traced(x, *observed), model.fusion(x, *observed))
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter.mul_(1.1)
    assert torch.equal(traced(x, *observed), model.fusion(x, *observed))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(given).isfinite().all()
