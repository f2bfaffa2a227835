"""Flat fusions and numbers of experts against their references, and the cases in which one fusion is another."""

import math
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, drawn_sizes, load, randomised, rows, widths
from references import experts
from references.layers import copy_parts, mlp_pairs, mlps
from torch import Tensor, nn

from features.errors import UserError
from models.fusion import FUSIONS, build_fusion
from models.fusion.adatt import AdaTT
from models.fusion.aitm import AITM
from models.fusion.cross_stitch import CrossStitch
from models.fusion.mmoe import MMoE
from models.fusion.ple import CGC, PLE
from models.fusion.single_task import SingleTask
from models.fusion.tasks import TaskInfo

# Shapes: B rows, T tasks, L levels, E experts, D width.
MODELS = Path(__file__).parents[2] / "jobs/conf/model"
levels = st.lists(widths, min_size=1, max_size=3)
sizes = drawn_sizes(levels=levels, widths=widths, experts=st.integers(1, 3))


@st.composite
def drawn_counts(draw: st.DrawFn) -> Sizes:
    """Sizes with numbers of experts in one of the forms a config may give, 0 among them."""
    size, count = draw(sizes), st.integers(0, 2)
    by_task = st.lists(count, min_size=size.T, max_size=size.T)
    depth = {"min_size": len(size.levels), "max_size": len(size.levels)}
    size.tasks = draw(st.one_of(count, by_task, st.lists(by_task, **depth)))
    size.shared = draw(st.one_of(count, st.lists(count, **depth)))
    size.native = draw(st.booleans())
    return size


def sees_experts(kind: type[nn.Module], size: Sizes) -> bool:
    """Whether every task has an expert to choose from at every level: in PLE an own or a shared one, in AdaTT any."""
    counts_L = [experts.unit_counts(size.T, size.tasks, size.shared, level) for level in range(len(size.levels))]
    if kind is AdaTT:
        return all(any(counts) for counts in counts_L)
    return all(counts[t] or counts[size.T] for counts in counts_L for t in range(size.T))


def sample(size: Sizes, data: st.DataObject) -> AITM:
    """AITM with a drawn chain of some of the tasks."""
    chain = data.draw(st.permutations(range(size.T)))[: data.draw(st.integers(1, size.T))]
    return randomised(AITM(size.D, size.T, size.widths, chain), size.seed)


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_single_task_equals_its_reference(size):
    module = randomised(SingleTask(size.D, size.T, size.widths), size.seed)
    check(module, experts.SingleTask(size.D, size.T, size.widths), rows(size))
    assert module.gates(rows(size)) == []


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_cross_stitch_equals_its_reference(size):
    module = randomised(CrossStitch(size.D, size.T, size.levels), size.seed)
    check(module, experts.CrossStitch(size.D, size.T, size.levels), rows(size))


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.data())
def test_aitm_equals_its_reference(size, data):
    module = sample(size, data)
    check(module, experts.AITM(size.D, size.T, size.widths, module.chain), rows(size))


@settings(max_examples=examples(100), deadline=None)
@given(drawn_counts())
def test_ple_with_other_numbers_of_experts_by_task_and_level_equals_its_reference(size):
    assume(sees_experts(PLE, size))
    module = randomised(PLE(size.D, size.T, size.levels, size.tasks, size.shared), size.seed)
    check(module, experts.PLE(size.D, size.T, size.levels, size.tasks, size.shared), rows(size))


@settings(max_examples=examples(100), deadline=None)
@given(drawn_counts())
def test_adatt_with_other_numbers_of_experts_by_task_and_level_equals_its_reference(size):
    assume(sees_experts(AdaTT, size))
    arguments = (size.D, size.T, size.levels, size.tasks, size.shared, size.native)
    check(randomised(AdaTT(*arguments), size.seed), experts.AdaTT(*arguments), rows(size))


@pytest.mark.parametrize("kind", [PLE, AdaTT])
@settings(max_examples=examples(60), deadline=None)
@given(drawn_counts())
def test_every_parameter_takes_part_whatever_the_numbers_of_experts(kind, size):
    assume(sees_experts(kind, size))
    module = kind(size.D, size.T, size.levels, size.tasks, size.shared).double()
    # Gradient buckets of a distributed run wait for every parameter.
    torch.autograd.grad(module(rows(size)).sum(), list(module.parameters()), allow_unused=False)


@pytest.mark.parametrize("kind", [PLE, AdaTT])
@settings(max_examples=examples(60), deadline=None)
@given(drawn_counts())
def test_a_task_that_would_see_no_expert_is_refused_and_only_then(kind, size):
    with (
        nullcontext() if sees_experts(kind, size) else pytest.raises(UserError, match="a task sees no expert at level")
    ):
        kind(size.D, size.T, size.levels, size.tasks, size.shared)


@pytest.mark.parametrize("kind", [PLE, AdaTT])
@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_numbers_written_out_build_the_same_network_as_one_number(kind, size):
    depth = len(size.levels)
    forms = [
        (size.experts, 1),
        ([size.experts] * size.T, [1] * depth),
        ([[size.experts] * size.T for _ in range(depth)], 1),
    ]
    states = []
    for form in forms:
        torch.manual_seed(size.seed)
        states.append(kind(size.D, size.T, size.levels, *form).state_dict())
    for state in states[1:]:
        assert list(state) == list(states[0])
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize(
    ("counts", "key"),
    [
        ({"task_experts": [1, 1]}, "task_experts"),
        ({"task_experts": []}, "task_experts"),
        ({"task_experts": [[1, 1, 1]]}, "task_experts"),
        ({"task_experts": [[1, 1, 1], [1, 1]]}, "task_experts"),
        ({"task_experts": -1}, "task_experts"),
        ({"task_experts": [1, 1, -1]}, "task_experts"),
        ({"task_experts": [2, [1, 1, 1]]}, "task_experts"),
        ({"task_experts": 0, "shared_experts": [1, 0]}, "task_experts"),
        ({"shared_experts": [1, 1, 1]}, "shared_experts"),
        ({"shared_experts": []}, "shared_experts"),
        ({"shared_experts": [1, -1]}, "shared_experts"),
        ({"shared_experts": [[1], [1]]}, "shared_experts"),
    ],
)
@pytest.mark.parametrize("name", ["ple", "adatt"])
def test_numbers_of_experts_that_do_not_fit_are_refused_by_their_key(name, counts, key):
    with pytest.raises(UserError, match=f"^model.fusion.{key}: .*") as error:
        build_fusion({"name": name, "levels": [[4], [2]], **counts}, 5, ["a", "b", "c"], [])
    assert "\n" not in str(error.value)


def test_a_task_without_own_experts_takes_the_shared_ones_and_only_those():
    module = randomised(PLE(3, 2, [[4]], [0, 2], 1), 0)
    x_BD = rows(Sizes(B=3, D=3, seed=0))
    gate_BTE = module.gates(x_BD)[0]
    close(gate_BTE[:, 0], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(3, 3))
    assert (gate_BTE[:, 1] > 0).all()


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_cgc_is_ple_of_one_level_and_equals_its_reference(size):
    module = randomised(CGC(size.D, size.T, [size.widths], size.experts, 2), size.seed)
    other = load(PLE(size.D, size.T, [size.widths], size.experts, 2), module.state_dict())
    assert torch.equal(module(rows(size)), other(rows(size)))
    check(module, experts.PLE(size.D, size.T, [size.widths], size.experts, 2), rows(size))


def test_cgc_of_two_levels_is_refused():
    with pytest.raises(UserError, match=r"^model\.fusion\.levels: cgc has one level, not 2; with more it is ple$"):
        build_fusion({"name": "cgc", "levels": [[4], [2]]}, 3, ["a"], [])


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_ml_mmoe_of_one_level_is_mmoe_as_published(size):
    config = {"num_experts": size.experts, "levels": [size.widths]}
    tasks = [f"t{t}" for t in range(size.T)]
    module = randomised(build_fusion({"name": "ml_mmoe", **config}, size.D, tasks, []), size.seed)
    other = load(build_fusion({"name": "mmoe", **config}, size.D, tasks, []), module.state_dict())
    assert torch.equal(module(rows(size)), other(rows(size)))
    check(module, experts.MMoE(size.D, size.T, size.experts, [size.widths]), rows(size))


def one_stack(module: nn.Module, prefixes: list[str]) -> dict[str, Tensor]:
    """Parameters of stacks that follow each other, named as those of one stack `networks`."""
    state, depth = {}, 0
    for prefix in prefixes:
        layers = module.get_submodule(prefix).layers
        for layer in layers:
            for name, value in layer.named_parameters():
                state[f"networks.layers.{depth}.{name}"] = value
            depth += 1
    return state


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_cross_stitch_that_keeps_everything_is_single_task(size):
    module = CrossStitch(size.D, size.T, size.levels, keep=1.0).double()
    state = one_stack(module, [f"networks.{level}" for level in range(len(size.levels))])
    other = load(SingleTask(size.D, size.T, [width for layers in size.levels for width in layers]), state)
    close(module(rows(size)), other(rows(size)))


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_cross_stitch_starts_with_rows_that_keep_most_and_sum_to_one(tasks):
    module = CrossStitch(3, tasks, [[4], [2]], keep=0.7)
    for stitch_BST in module.gates(torch.zeros(5, 3)):
        assert stitch_BST.shape == (5, tasks, tasks)
        for s in range(tasks):
            assert stitch_BST[0, s, s].item() == pytest.approx(0.7)
            assert stitch_BST[0, s].sum().item() == pytest.approx(1 if tasks > 1 else 0.7)


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_adatt_sp_whose_gates_see_nothing_is_a_stack_of_native_experts(size):
    module = randomised(AdaTT(size.D, size.T, size.levels, 1, 0), size.seed)
    gates = load(AdaTT(size.D, size.T, size.levels, 1, 0, native=False), module.state_dict())
    for level, gate in zip(module.levels, gates.levels, strict=True):
        level.weights = lambda x_UBD, both=level.weights, gate=gate: both(x_UBD) - gate.weights(x_UBD)
    state = one_stack(module, [f"levels.{level}.experts" for level in range(len(size.levels))])
    other = load(SingleTask(size.D, size.T, [width for layers in size.levels for width in layers]), state)
    close(module(rows(size)), other(rows(size)))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_adatt_with_zero_gates_adds_the_mean_of_all_experts_to_the_native_combination(size):
    module = randomised(AdaTT(size.D, size.T, [size.widths], size.experts, 1), size.seed)
    with torch.no_grad():
        module.get_parameter("levels.0.gate.weight_SDH").zero_()
    own = experts.AdaTT(size.D, size.T, [size.widths], size.experts, 1).own
    x_BD, networks = rows(size), mlps(size.T * size.experts + 1, [size.D, *size.widths]).double()
    copy_parts(mlp_pairs(networks, module.get_submodule("levels.0.experts")))
    expert_EBD = torch.stack([network(x_BD) for network in networks])
    h_BTD = module(x_BD)
    for t in range(size.T):
        native_E = module.get_parameter("levels.0.native_OE")[t] if size.experts > 1 else torch.ones(size.T + 1)
        native_BD = sum(native_E[e] * expert_EBD[e] for e in own(0, t))
        close(h_BTD[:, t], native_BD + expert_EBD.mean(0))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_aitm_of_one_task_is_a_plain_network(size):
    module = randomised(AITM(size.D, 1, size.widths, calibrator=0.6), size.seed)
    close(module(rows(size)), load(SingleTask(size.D, 1, size.widths), module.state_dict())(rows(size)))
    close(module.gates(rows(size))[0], torch.ones(size.B, 1, 1, dtype=torch.float64))
    close(module.penalty(rows(size, 1)), torch.zeros(size.B, dtype=torch.float64))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_a_task_of_aitm_reads_the_networks_of_those_before_it_in_the_chain_and_no_other(size, data):
    module, x_BD = sample(size, data), rows(size)
    before = module(x_BD)
    step = data.draw(st.integers(0, len(module.chain) - 1))
    with torch.no_grad():
        for name, value in module.networks.named_parameters():
            value[module.chain[step]] += 100 if "bias" in name else 1
    changed = (module(x_BD) != before).flatten(2).any(2).any(0)
    assert not changed[[task for task in range(size.T) if task not in module.chain[step:]]].any()


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_a_task_outside_of_the_chain_is_its_own_network(size, data):
    module = sample(size, data)
    outside = [task for task in range(size.T) if task not in module.chain]
    assume(outside)
    networks = {f"networks.{name}": value for name, value in module.networks.state_dict().items()}
    alone = load(SingleTask(size.D, size.T, size.widths), networks)
    close(module(rows(size))[:, outside], alone(rows(size))[:, outside])


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_gates_of_aitm_sum_to_one_over_the_task_and_the_one_before_it(size, data):
    module = sample(size, data)
    (weight_BTT,) = module.gates(rows(size))
    close(weight_BTT.sum(2), torch.ones(size.B, size.T, dtype=torch.float64))
    assert (weight_BTT >= 0).all()
    before = dict(pairwise(reversed(module.chain)))
    for task in range(size.T):
        seen = {task, before.get(task, task)}
        assert not weight_BTT[:, task, [t for t in range(size.T) if t not in seen]].any()


def infos_of(given: dict[int, int], num_tasks: int) -> list[TaskInfo]:
    return [TaskInfo(f"t{t}", given=f"t{given[t]}" if t in given else None) for t in range(num_tasks)]


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.data(), st.sampled_from([0.1, 0.6, 3.0]))
def test_the_calibrator_of_aitm_equals_its_formula_along_the_chain(size, data, weight):
    chain = data.draw(st.permutations(range(size.T)))[: data.draw(st.integers(1, size.T))]
    order = data.draw(st.permutations(range(size.T)))
    given = {order[k]: order[data.draw(st.integers(0, k - 1))] for k in range(1, size.T) if data.draw(st.booleans())}
    logit_BT = (3 * rows(size, size.T)).requires_grad_()
    module = AITM(size.D, size.T, size.widths, chain, weight, tasks=infos_of(given, size.T))
    penalty_B, wanted_B = module.penalty(logit_BT), experts.calibrator(logit_BT, chain, weight, given)
    close(penalty_B, wanted_B)
    probe_B = torch.randn(size.B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = [torch.autograd.grad((loss_B * probe_B).sum(), logit_BT, materialize_grads=True)[0]
              if loss_B.requires_grad else torch.zeros_like(logit_BT) for loss_B in (penalty_B, wanted_B)]  # fmt: skip
    close(*slopes, "gradient")


def test_a_step_given_the_one_before_it_is_never_likelier_than_that_one():
    config = {"name": "aitm", "widths": [4], "calibrator": 0.6}
    logit_BT = 5 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    tasks = [TaskInfo("click"), TaskInfo("cart", given="click"), TaskInfo("buy", given="cart")]
    names = ["click", "cart", "buy"]
    assert not build_fusion(config, 5, names, [], infos=tasks).penalty(logit_BT).any()
    assert build_fusion(config, 5, names, []).penalty(logit_BT).any()
    backwards = build_fusion(config | {"chain": ["buy", "click"]}, 5, names, [], infos=tasks).penalty(logit_BT)
    p_BT = logit_BT.sigmoid()
    torch.testing.assert_close(backwards, 0.6 * (p_BT[:, 0] - p_BT.prod(1)), rtol=1e-5, atol=1e-6)


def test_the_calibrator_stays_finite_at_logits_as_large_as_they_get():
    module = AITM(3, 3, [4], [0, 1], 0.6, tasks=infos_of({1: 0}, 3))
    logit_BT = torch.tensor([[-1e30, 1e30, 1e30], [1e30, -1e30, -1e30], [-800.0, -800.0, 0.0]], requires_grad=True)
    penalty_B = module.penalty(logit_BT)
    penalty_B.sum().backward()
    assert penalty_B.tolist() == [0, 0, 0]
    assert logit_BT.grad.isfinite().all()


WITHOUT_PROBABILITY = {
    "a regression": ([TaskInfo("dwell", "regression")], r"task dwell is of kind regression and has no"),
    "an undeclared condition": ([TaskInfo("buy", undeclared=("click",))], r"task buy .* add `given: click` to buy in"),
    "a condition that is not trained": ([TaskInfo("buy", given="cart")], r"task buy is given cart, .* train cart too"),
    "a condition further up": (
        [TaskInfo("buy", given="cart"), TaskInfo("cart", undeclared=("click",))], r"task buy is observed .* to cart in"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_PROBABILITY)
def test_a_calibrator_over_a_task_without_a_probability_over_all_rows_is_refused(case):
    others, message = WITHOUT_PROBABILITY[case]
    infos, names = [TaskInfo("click"), *others], ["click", *(task.name for task in others)]
    config = {"name": "aitm", "widths": [4], "calibrator": 0.6, "chain": names[:2]}
    with pytest.raises(UserError, match=rf"^model\.fusion\.calibrator: {message}") as refused:
        build_fusion(config, 5, names, [], infos=infos)
    assert "leave it out of model.fusion.chain" in str(refused.value)
    assert "\n" not in str(refused.value)
    build_fusion(config | {"chain": ["click"]}, 5, names, [], infos=infos)
    assert (
        build_fusion(config | {"calibrator": 0.0}, 5, names, [], infos=infos).penalty(torch.zeros(2, len(names)))
        is None
    )


def test_the_calibrator_of_aitm_is_zero_on_a_funnel_and_grows_where_a_later_step_is_likelier():
    module = AITM(3, 3, [4], chain=[2, 0, 1], calibrator=0.6)
    logit_BT = torch.tensor([[0.0, -1.0, 1.0], [math.log(3), 0.0, 0.0]], requires_grad=True)
    penalty_B = module.penalty(logit_BT)
    assert penalty_B[0] == 0
    assert penalty_B[1].item() == pytest.approx(0.6 * 0.25)  # .75 after .5
    penalty_B.sum().backward()
    assert (logit_BT.grad[0] == 0).all()
    assert logit_BT.grad[1, 0] > 0 > logit_BT.grad[1, 2]


def test_without_a_calibrator_aitm_has_no_penalty():
    assert AITM(3, 2, [4]).penalty(torch.zeros(5, 2)) is None


@pytest.mark.parametrize("chain", [["a", "b", "b"], ["a", "b", "c", "a"], []])
def test_a_chain_that_names_a_task_twice_or_none_is_refused(chain):
    with pytest.raises(
        UserError, match=rf"^model\.fusion\.chain: \[{', '.join(chain)}\] must name each of its tasks once"
    ):
        build_fusion({"name": "aitm", "widths": [4], "chain": chain}, 5, ["a", "b", "c"], [])


def test_what_tasks_are_is_no_part_of_a_config():
    with pytest.raises(UserError, match=r"^model\.fusion\.tasks: the schema"):
        build_fusion({"name": "aitm", "widths": [4], "tasks": []}, 5, ["a", "b"], [])


def test_a_chain_is_given_by_names_of_tasks_and_defaults_to_the_schemas_order():
    config = {"name": "aitm", "widths": [4]}
    assert build_fusion(config | {"chain": ["c", "a", "b"]}, 5, list("abc"), []).chain == [2, 0, 1]
    assert build_fusion(config | {"chain": None}, 5, list("abc"), []).chain == [0, 1, 2]


@pytest.mark.parametrize("values", [{"dropout": 1.0}, {"dropout": -0.1}, {"calibrator": -1.0}])
def test_values_of_aitm_out_of_range_are_refused(values):
    with pytest.raises(UserError, match=rf"^model\.fusion\.{next(iter(values))}: "):
        build_fusion({"name": "aitm", "widths": [4], **values}, 5, ["a", "b"], [])


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_a_cross_stitch_that_starts_outside_of_zero_to_one_is_refused(keep):
    with pytest.raises(UserError, match=r"^model\.fusion\.keep: "):
        build_fusion({"name": "cross_stitch", "levels": [[4]], "keep": keep}, 5, ["a", "b"], [])


def test_dropout_of_aitm_acts_in_training_only():
    module = AITM(6, 2, [64], dropout=0.5)
    x_BD = torch.randn(4, 6)
    assert not torch.equal(module(x_BD), module(x_BD))
    module.eval()
    assert torch.equal(module(x_BD), module(x_BD))


SHIPPED = ["single_task", "shared_bottom", "cross_stitch", "mmoe", "ml_mmoe", "cgc", "ple", "adatt", "adatt_sp", "aitm"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sizes_build_and_run_and_can_be_traced(name):
    config = yaml.safe_load((MODELS / f"{name}.yaml").read_text())["fusion"]
    module = build_fusion(config, 16, ["a", "b", "c"], [])
    x_BD = torch.randn(5, 16)
    assert isinstance(module, FUSIONS[config["name"]])
    assert module(x_BD).shape == (5, 3, module.out_dim) == (5, 3, 64)
    assert [gate_BUE.shape[:2] for gate_BUE in module.gates(x_BD)][-1:] in ([(5, 3)], [])
    # TorchRec's pipelined loop traces the model.
    assert torch.equal(torch.fx.symbolic_trace(module)(x_BD), module(x_BD))


def test_mmoe_ships_with_one_level_as_published_and_ml_mmoe_with_two():
    levels = {}
    for name in ("mmoe", "ml_mmoe"):
        config = yaml.safe_load((MODELS / f"{name}.yaml").read_text())["fusion"]
        assert config["name"] == name
        assert FUSIONS[name] is MMoE
        levels[name] = config["levels"]
    assert levels == {"mmoe": [[128, 64]], "ml_mmoe": [[128], [64]]}
