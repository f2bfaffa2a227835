"""AutoMTL's supernet and the network that is derived from it against their reference."""

import math
import random

import pytest
import torch
from automtl_sizes import BLOCKS, INTERACTIONS, automtl_sizes, columns, some
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, check_gates, close, load, randomised, rows
from references import automtl as reference
from torch import Tensor, nn

from features.errors import UserError
from models.automtl.architecture import Architecture
from models.fusion import build_fusion
from models.fusion.automtl import AutoMTL, Supernet, diversity_loss
from models.fusion.tasks import TaskInfo
from models.layers import GateLayers

# Shapes: B rows, T tasks, D width in, N experts, L blocks of an expert, O candidates of a block, I of the interaction, H width
# out.
SUPERNETS = automtl_sizes(
    interaction=some(INTERACTIONS, 3), blocks=some(BLOCKS, 4), L=st.integers(1, 2), homogeneous=st.booleans(),
    selection=st.sampled_from(["beta", "gates"]), auxiliary=st.sampled_from([0.0, 0.3]),
    sharpness=st.sampled_from([1.0, 2.5]),
)  # fmt: skip


def supernet(size: Sizes) -> Supernet:
    """In float64, differentiable by alpha and beta too."""
    module = Supernet(
        size.D, size.T, columns(size), size.H, size.W, size.N, size.L, size.interaction, size.blocks, size.nested,
        size.homogeneous, size.selection,
    )  # fmt: skip
    module.auxiliary, module.sharpness = size.auxiliary, size.sharpness
    return randomised(module, size.seed).requires_grad_()


def space(size: Sizes) -> reference.Space:
    return reference.Space(
        columns(size), size.T, size.N, size.L, size.interaction, size.blocks, size.nested, size.homogeneous,
        size.selection, size.auxiliary, size.sharpness,
    )  # fmt: skip


def small(**changes: object) -> Sizes:
    common = {
        "B": 4, "D": 5, "T": 2, "seed": 3, "H": 3, "F": 3, "W": 4, "N": 3, "L": 2, "nested": True, "homogeneous": False,
        "interaction": ["cross_2", "product_outer", "skip"], "blocks": ["mlp_4", "gating", "conv_3", "skip"],
        "selection": "beta", "auxiliary": 0.0, "sharpness": 1.0,
    }  # fmt: skip
    return Sizes(**(common | changes))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=examples(60), deadline=None)
@given(SUPERNETS)
def test_the_supernet_equals_its_reference(size):
    module = supernet(size)

    def twin(params: dict[str, Tensor], x_BD: Tensor) -> tuple[Tensor, Tensor]:
        return reference.supernet(params, x_BD, space(size))

    check(module, lambda params, x_BD: twin(params, x_BD)[0], rows(size))
    check_gates(module.gates(rows(size)), [twin(dict(module.named_parameters()), rows(size))[1]])


def test_only_a_search_differentiates_by_alpha_and_beta_which_start_almost_even():
    module = Supernet(3, 2, [[0], [1, 2]], 4, 4, 30, 3, INTERACTIONS, BLOCKS)
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    assert {name: tuple(p.shape) for name, p in frozen.items()} == {
        "alpha_I": (len(INTERACTIONS),), "alpha_NLO": (30, 3, len(BLOCKS)), "beta_TN": (2, 30)
    }  # fmt: skip
    for p in frozen.values():
        assert 0 < p.std() < 3e-3
        assert p.abs().max() < 1e-2


def test_homogeneous_experts_share_alpha_and_no_weights():
    module = Supernet(3, 2, [[0], [1, 2]], 4, 4, 3, 2, ["skip"], BLOCKS, homogeneous=True)
    assert module.alpha_NLO.shape == (1, 2, len(BLOCKS))
    strengths = module.strengths()
    assert strengths.expert_NLO.shape == (3, 2, len(BLOCKS))
    assert (strengths.expert_NLO == strengths.expert_NLO[0]).all()
    assert module.blocks[0].kinds["gating"].gate.weight_SDH.shape[0] == 3


# One path of the supernet


@settings(max_examples=examples(60), deadline=None)
@given(SUPERNETS, st.sampled_from([0.2, 1.0, 3.0]))
def test_a_sampled_forward_is_the_drawn_path_and_alpha_has_the_straight_through_gradient(size, temperature):
    size.selection = "beta"
    module, x_BD = supernet(size), rows(size).requires_grad_()
    module.sample(rng(size.seed), temperature)
    params, path = dict(module.named_parameters()), module.path
    alpha_I, alpha_NLO = params["alpha_I"], params["alpha_NLO"].expand(size.N, -1, -1)
    noise_I, noise_NLO = path.noise_I.double(), path.noise_NLO.double()
    logit_I, logit_NLO = size.sharpness * alpha_I, size.sharpness * alpha_NLO
    chosen = highest(logit_I + noise_I)
    chosen_NL = [[highest(logit_NLO[n, level] + noise_NLO[n, level]) for level in range(size.L)] for n in range(size.N)]
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    one_NL = torch.ones(size.N, size.L, dtype=torch.float64, requires_grad=True)
    found_BTH = module(x_BD)
    wanted_BTH = reference.sampled(params, x_BD, space(size), chosen, chosen_NL, one, one_NL)
    close(found_BTH, wanted_BTH)
    probe_BTH = torch.randn(found_BTH.shape, generator=rng(1), dtype=torch.float64)
    rest = {"x": x_BD} | {name: p for name, p in params.items() if not name.startswith("alpha")}
    inputs = [*rest.values(), alpha_I, params["alpha_NLO"]]
    *found, by_I, by_NLO = torch.autograd.grad(found_BTH, inputs, probe_BTH)  # all of them are used
    *wanted, by_one, by_NL = torch.autograd.grad(
        wanted_BTH, [*rest.values(), one, one_NL], probe_BTH, materialize_grads=True
    )
    for name, real, loop in zip(rest, found, wanted, strict=True):
        close(real, loop, f"gradient of {name}")
    by_logit_I = torch.stack(reference.straight_through(logit_I, noise_I, temperature, chosen, by_one))
    close(by_I, size.sharpness * by_logit_I)
    own_NLO = torch.zeros_like(noise_NLO)
    for n, level in [(n, level) for n in range(size.N) for level in range(size.L)]:
        place = (logit_NLO[n, level], noise_NLO[n, level], temperature, chosen_NL[n][level], by_NL[n, level])
        own_NLO[n, level] = torch.stack(reference.straight_through(*place)).detach()
    close(by_NLO, size.sharpness * (own_NLO.sum(0, keepdim=True) if size.homogeneous else own_NLO))


def highest(score_O: Tensor) -> int:
    return max(range(len(score_O)), key=lambda o: score_O[o].item())


def test_draws_have_the_probabilities_of_the_mixture_at_any_temperature():
    for temperature, sharpness in ((0.1, 1.0), (1.0, 3.0), (5.0, 1.0)):
        module, draws, generator = supernet(small(sharpness=sharpness)), 4000, rng(5)
        strengths = module.strengths()
        drawn_I, drawn_NLO = torch.zeros(3), torch.zeros(3, 2, 4)
        for _ in range(draws):
            module.sample(generator, temperature)
            choice, weight_I = module.path.of(sharpness * module.alpha_I, module.path.noise_I)
            _, weight_NLO = module.path.of(sharpness * module.alpha_NLO, module.path.noise_NLO)
            assert weight_I[choice] == 1
            drawn_I, drawn_NLO = drawn_I + weight_I.detach(), drawn_NLO + weight_NLO.detach()
        for drawn, p in ((drawn_I, strengths.interaction_I), (drawn_NLO, strengths.expert_NLO)):
            assert ((drawn - draws * p).abs() <= 4.5 * (draws * p * (1 - p)).sqrt() + 1).all()


def test_the_blocks_of_a_path_are_drawn_one_by_one():
    module, generator, seen = supernet(small(blocks=["gating", "skip"])), rng(0), set()
    with torch.no_grad():
        module.alpha_NLO.zero_()
    for _ in range(1000):
        module.sample(generator)
        seen.add(tuple(module.path.noise_NLO.argmax(2).flatten().tolist()))
    assert len(seen) == 2**6


def test_a_path_of_homogeneous_experts_has_the_same_operation_in_all_of_them():
    module, generator = supernet(small(homogeneous=True)), rng(0)
    for _ in range(20):
        module.sample(generator)
        choice_NL, _ = module.path.of(module.alpha_NLO.expand(3, -1, -1), module.path.noise_NLO)
        assert (choice_NL == choice_NL[0]).all()


def test_a_path_follows_from_its_seed_until_all_candidates_are_asked_for_again():
    module, x_BD = supernet(small()), rows(small())
    whole_BTH = module(x_BD)
    module.sample(rng(8))
    first_BTH = module(x_BD)
    assert torch.equal(module(x_BD), first_BTH)
    outputs = []
    for seed in range(7, 12):
        module.sample(rng(seed))
        outputs.append(module(x_BD))
    assert torch.equal(outputs[1], first_BTH)
    assert not all(torch.equal(one, first_BTH) for one in outputs)
    module.sample(None)
    assert torch.equal(module(x_BD), whole_BTH)


@pytest.mark.parametrize("selection", ["beta", "gates"])
def test_every_weight_has_a_gradient_in_a_sampled_forward_though_most_are_not_computed(selection):
    module = supernet(small(selection=selection))
    module.sample(rng(2))
    module(rows(small())).square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is None} == set()
    idle = {name.split(".")[2] for name, p in module.named_parameters() if "kinds" in name and not p.grad.any()}
    assert idle & {"cross", "product", "skip"}


@settings(max_examples=examples(30), deadline=None)
@given(automtl_sizes(noise=st.floats(0.1, 5.0)))
def test_eq_2_is_the_negative_divergence_of_the_tasks_selections(size):
    beta_TN = size.noise * torch.randn(size.T, size.N, generator=rng(size.seed), dtype=torch.float64)
    beta_TN.requires_grad_()
    found, wanted = diversity_loss(beta_TN), reference.negative_divergence(beta_TN)
    close(found, wanted)
    close(*(torch.autograd.grad(loss, beta_TN)[0] for loss in (found, wanted)))
    assert -math.log(size.T) - 1e-12 <= found <= 1e-12


def test_eq_2_is_least_where_each_task_has_experts_of_its_own_and_0_where_all_have_the_same():
    apart_TN = 60 * torch.eye(3, dtype=torch.float64)
    close(diversity_loss(apart_TN), torch.tensor(-math.log(3), dtype=torch.float64))
    close(diversity_loss(torch.randn(1, 5, dtype=torch.float64).expand(4, 5)), torch.zeros((), dtype=torch.float64))


def test_eq_2_has_a_gradient_where_a_task_has_all_but_given_up_an_expert():
    beta_TN = torch.tensor([[0.0, -200.0, 1.0], [0.0, -300.0, 0.0]], requires_grad=True)
    loss = diversity_loss(beta_TN)
    (gradient_TN,) = torch.autograd.grad(loss, beta_TN)
    assert loss.isfinite()
    assert gradient_TN.isfinite().all()
    double_TN = beta_TN.detach().double()[:, [0, 2]].requires_grad_()
    expected_TN = torch.autograd.grad(reference.negative_divergence(double_TN), double_TN)[0]
    torch.testing.assert_close(gradient_TN[:, [0, 2]].double(), expected_TN, rtol=1e-5, atol=1e-6)


# The derived network


@st.composite
def networks(draw: st.DrawFn) -> Sizes:
    """Sizes with an architecture: a list of experts for each task, in any order."""
    size = draw(automtl_sizes(N=st.integers(1, 4), L=st.integers(1, 3), layers=st.lists(st.integers(1, 3), max_size=2)))
    block = st.sampled_from(["mlp_2", "mlp_3", "conv_3", "gating", "skip"])
    expert = st.lists(block, min_size=size.L, max_size=size.L)
    size.experts = draw(st.lists(expert, min_size=size.N, max_size=size.N))
    numbers = st.lists(st.integers(1, size.N), unique=True, min_size=1)
    size.tasks, size.bias = [draw(numbers) for _ in range(size.T)], draw(st.booleans())
    size.interaction = draw(st.sampled_from(INTERACTIONS))
    return size


def architecture(size: Sizes) -> Architecture:
    tasks = {f"t{t}": numbers for t, numbers in enumerate(size.tasks)}
    return Architecture(width=size.H, token_dim=size.W, interaction=size.interaction, experts=size.experts, tasks=tasks)


def network(size: Sizes, found: Architecture | None = None, tasks: list[str] | None = None) -> AutoMTL:
    infos = [TaskInfo(name) for name in tasks or [f"t{t}" for t in range(size.T)]]
    gate = GateLayers(bias=size.bias, layers=tuple(size.layers))
    module = AutoMTL(size.D, len(infos), columns(size), found or architecture(size), infos, gate)
    return randomised(module, size.seed)


@settings(max_examples=examples(80), deadline=None)
@given(networks())
def test_the_derived_network_equals_its_reference(size):
    module = network(size)

    def twin(params: dict[str, Tensor], x_BD: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (columns(size), size.interaction, size.experts, size.tasks, len(size.layers))
        return reference.derived(params, x_BD, *chosen)

    check(module, lambda params, x_BD: twin(params, x_BD)[0], rows(size))
    check_gates(module.gates(rows(size)), [twin(dict(module.named_parameters()), rows(size))[1]])
    assert module(rows(size)).shape == (size.B, size.T, module.out_dim)


@settings(max_examples=examples(40), deadline=None)
@given(networks())
def test_experts_that_no_task_has_change_nothing(size):
    used = sorted({number for numbers in size.tasks for number in numbers})
    without = Sizes(**vars(size))
    without.experts = [size.experts[number - 1] for number in used]
    without.tasks = [[used.index(number) + 1 for number in numbers] for numbers in size.tasks]
    module, other = network(size), network(without)
    load(other, dict(module.named_parameters()))
    close(other(rows(size)), module(rows(size)))
    assert module.gate_names(["a"], [])[0].experts == [f"expert {number}" for number in used]


@settings(max_examples=examples(40), deadline=None)
@given(networks(), st.data())
def test_a_model_of_some_tasks_in_another_order_has_the_experts_of_these(size, data):
    order = data.draw(st.permutations(range(size.T)))[: data.draw(st.integers(1, size.T))]
    fewer = Sizes(**vars(size))
    fewer.tasks = [size.tasks[t] for t in order]
    module = network(size, architecture(size), [f"t{t}" for t in order])
    plain = network(fewer, architecture(fewer), [f"t{t}" for t in range(len(order))])
    load(plain, dict(module.named_parameters()))
    close(module(rows(size)), plain(rows(size)))


def test_a_network_of_the_operations_with_all_weight_gives_each_expert_what_it_gave_in_the_supernet():
    size = small(T=3, nested=True, blocks=["mlp_4", "gating", "conv_3", "skip"], interaction=["mlp_3", "cross_2"])
    choice_NL, names = [[0, 2], [1, 0], [2, 3]], size.blocks
    whole, x_BD = supernet(size), rows(size)
    with torch.no_grad():  # softmax is exactly one-hot
        whole.alpha_I.copy_(torch.tensor([-1e4, 0]))
        whole.alpha_NLO.copy_(1e4 * nn.functional.one_hot(torch.tensor(choice_NL), 4))
        whole.beta_TN.copy_(1e4 * torch.eye(3))
    experts = [[names[o] for o in row] for row in choice_NL]
    found = Architecture(
        width=size.H, token_dim=size.W, interaction="cross_2", experts=experts, tasks={"t0": [1], "t1": [2], "t2": [3]}
    )
    size.bias, size.layers = False, []
    module, state = network(size, found), whole.state_dict()
    own = {"gate.weight_SDH": module.gate.weight_SDH.detach()}
    own |= {name: state[name] for name in module.state_dict() if name.startswith("interaction.")}
    for name in module.state_dict():
        if name.startswith("blocks."):
            _, level, _, operation, *rest = name.split(".")
            experts_of = [n for n in range(3) if experts[n][int(level)] == operation]
            kind = operation.split("_")[0]
            own[name] = state[f"blocks.{level}.kinds.{kind}.{'.'.join(rest)}"][experts_of]
    close(load(module, own)(x_BD), whole(x_BD))


def test_a_task_that_the_architecture_does_not_have_is_said_in_one_line():
    size = small(experts=[["skip"]], tasks=[[1], [1]], interaction="skip", bias=False, layers=[])
    with pytest.raises(UserError) as caught:
        network(size, architecture(size), ["t1", "like", "buy"])
    assert str(caught.value) == (
        "model.architecture: has no experts for like, only for t0, t1. Search on this dataset, or write experts for it into "
        "the file."
    )


@pytest.mark.parametrize("sample", [False, True])
def test_half_precision_runs_in_supernet_and_derived_network(sample):
    size, generator = small(bias=True, layers=[3]), random.Random(1)
    whole = supernet(size)
    size.experts = [[generator.choice(size.blocks) for _ in range(2)] for _ in range(3)]
    size.tasks, size.interaction = [[1, 3], [2]], "attention_2"
    for module in (whole, network(size)):
        if sample and module is whole:
            module.sample(rng(4))
        with torch.no_grad():
            wanted = module(rows(size))
            with torch.autocast("cpu", torch.bfloat16):
                found = module.float()(rows(size).float())
        assert (found - wanted).norm() <= 0.05 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        whole(rows(size).float()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in whole.parameters())


ARCHITECTURE = {"width": 4, "token_dim": 4, "interaction": "cross_1", "experts": [["mlp_4"], ["skip"]],
                "tasks": {"a": [1], "b": [2, 1]}}  # fmt: skip
SPACE = {"name": "automtl_supernet", "width": 4, "token_dim": 4, "experts": 2, "depth": 1, "interaction": ["skip"],
         "blocks": ["skip"]}  # fmt: skip


@pytest.mark.parametrize(("config", "says"), [
    ({"name": "automtl"}, "model.fusion.architecture: "),
    ({"name": "automtl", "architecture": ARCHITECTURE | {"width": 0}}, "model.fusion.architecture.width: "),
    ({"name": "automtl", "architecture": ARCHITECTURE | {"depth": 3}}, "model.fusion.architecture.depth: "),
    ({"name": "automtl", "architecture": ARCHITECTURE | {"tasks": {"a": [1]}}}, "has no experts for b, only for a"),
    ({"name": "automtl", "architecture": ARCHITECTURE | {"interaction": "attention_3"}}, "not a multiple of 3"),
    (SPACE | {"width": 0}, "model.fusion.width: "), (SPACE | {"experts": 0}, "model.fusion.experts: "),
    (SPACE | {"depth": 65}, "model.fusion.depth: "), (SPACE | {"blocks": []}, "model.fusion.blocks: "),
    (SPACE | {"selection": "all"}, "model.fusion.selection: "), (SPACE | {"blocks": ["conv_2"]}, "space.blocks: conv_2: "),
    (SPACE | {"interaction": ["dot"]}, "space.interaction: dot is not one of product, cross"),
])  # fmt: skip
def test_what_the_fusions_do_not_take_is_said_in_one_line(config, says):
    with pytest.raises(UserError) as caught:
        build_fusion(config, 3, ["a", "b"], ["f", "g"], columns=[[0], [1, 2]])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
