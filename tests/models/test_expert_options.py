"""Layers of experts and gates by config, and AdaTT's native vectors, against references in float64 and by their properties."""

import math

import pytest
import torch
from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, drawn_sizes, randomised, rows, widths
from references import experts as references
from references import fields
from torch import Tensor, nn

from features.errors import UserError
from models.fusion import build_fusion
from models.fusion.adatt import AdaTT
from models.layers import ExpertLayers, StackedLayerNorm

# Shapes: B rows, T tasks, U inputs, S networks, L levels, E experts, O units with an output, D and H width.
expert_layers = st.fixed_dictionaries(
    {"activation": st.sampled_from(["relu", "gelu", "silu"]), "norm": st.sampled_from(["none", "layer"])}
)
gate_layers = st.fixed_dictionaries({"bias": st.booleans(), "layers": st.lists(st.integers(1, 4), max_size=2)})
counts = st.integers(0, 3)
sizes = drawn_sizes(
    levels=st.lists(widths, min_size=1, max_size=3), widths=widths, experts=expert_layers, gate=gate_layers,
    tasks=st.integers(1, 2), shared=counts,
)  # fmt: skip
GATED = {
    "mmoe": (references.MMoE, ("num_experts", "levels")),
    "ml_mmoe": (references.MMoE, ("num_experts", "levels")),
    "ple": (references.PLE, ("levels", "task_experts", "shared_experts")),
    "adatt": (references.AdaTT, ("levels", "task_experts", "shared_experts")),
}
UNGATED = {
    "single_task": (references.SingleTask, ("widths",)),
    "shared_bottom": (references.SharedBottom, ("widths",)),
    "cross_stitch": (references.CrossStitch, ("levels",)),
    "aitm": (references.AITM, ("widths",)),
}


def both(name: str, size: Sizes, **options: object) -> tuple[nn.Module, nn.Module]:
    """The fusion, as a config names it, and its reference."""
    reference, keys = (GATED | UNGATED)[name]
    known = {
        "num_experts": size.tasks, "levels": size.levels, "widths": size.widths, "task_experts": size.tasks,
        "shared_experts": size.shared,
    }  # fmt: skip
    config = {key: known[key] for key in keys} | options
    module = build_fusion({"name": name, **config}, size.D, [f"t{t}" for t in range(size.T)], [])
    return randomised(module, size.seed), reference(size.D, size.T, **config)


@pytest.mark.parametrize("name", UNGATED)
@settings(max_examples=examples(25), deadline=None)
@given(sizes)
def test_fusions_without_gates_equal_their_references_with_any_layers(name, size):
    check(*both(name, size, experts=size.experts), rows(size))


@settings(max_examples=examples(15), deadline=None)
@given(sizes, st.integers(1, 3))
def test_networks_above_features_equal_their_references_with_any_layers(size, num_fields):
    x_BFW, tasks, names = rows(size, num_fields, size.D), [f"t{t}" for t in range(size.T)], list("abc")[:num_fields]
    config = {"widths": size.widths, "hidden": 3, "squeeze": 2, "experts": size.experts}
    module = build_fusion({"name": "apem", **config}, size.D, tasks, names)
    check(randomised(module, size.seed), fields.APEM(size.D, size.T, num_fields, **config), x_BFW)
    config |= {"condition": 2, "behaviours": ["a"]}
    module = build_fusion({"name": "dtrn", **config}, size.D, tasks, names)
    reference = fields.DTRN(size.D, size.T, num_fields, **config | {"behaviours": [0]})
    check(randomised(module, size.seed), reference, x_BFW)


@pytest.mark.parametrize("name", GATED)
@settings(max_examples=examples(25), deadline=None)
@given(sizes)
def test_fusions_with_gates_equal_their_references_with_any_layers_of_experts_and_gates(name, size):
    check(*both(name, size, experts=size.experts, gate=size.gate), rows(size))


@settings(max_examples=examples(25), deadline=None)
@given(sizes)
def test_cgc_with_any_layers_is_ple_of_one_level(size):
    size.levels = [size.widths]
    module, reference = both("ple", size, experts=size.experts, gate=size.gate)
    config = {"levels": size.levels, "task_experts": size.tasks, "shared_experts": size.shared}
    config |= {"name": "cgc", "experts": size.experts, "gate": size.gate}
    cgc = build_fusion(config, size.D, [f"t{t}" for t in range(size.T)], []).double()
    cgc.load_state_dict(module.state_dict())
    check(cgc, reference, rows(size))


@pytest.mark.parametrize("name", GATED)
@settings(max_examples=examples(20), deadline=None)
@given(sizes)
def test_every_parameter_takes_part_whatever_the_layers(name, size):
    module, _ = both(name, size, experts=size.experts, gate=size.gate)
    # Gradient buckets of a distributed run wait for every parameter.
    torch.autograd.grad(module(rows(size)).sum(), list(module.parameters()), allow_unused=False)


@settings(max_examples=examples(40), deadline=None)
@given(drawn_sizes(readers=st.lists(counts, min_size=1, max_size=4).filter(any)), widths, expert_layers)
def test_each_input_goes_to_as_many_networks_as_read_it_with_any_layers(size, widths, options):
    stack = ExpertLayers(**options).stack(sum(size.readers), size.D, widths, size.readers)
    stack = randomised(stack, size.seed)
    x_UBD = rows(size, len(size.readers), size.D).transpose(0, 1)
    source_S = [u for u, count in enumerate(size.readers) for _ in range(count)]
    y_SBH = stack(x_UBD)
    for s, u in enumerate(source_S):
        alone = ExpertLayers(**options).stack(1, size.D, widths).double()
        alone.load_state_dict({name: value[s : s + 1] for name, value in stack.state_dict().items()})
        close(y_SBH[s : s + 1], alone(x_UBD[u : u + 1]))


@settings(max_examples=examples(15), deadline=None)
@given(sizes)
def test_a_row_depends_on_no_other_row_under_layer_normalisation(size):
    module, _ = both("ple", size, experts={"norm": "layer"}, gate=size.gate)
    x_BD = rows(size)
    close(torch.cat([module(x_D.unsqueeze(0)) for x_D in x_BD]), module(x_BD))


def test_layer_normalisation_starts_without_a_scale_and_with_rows_of_mean_0_and_variance_1():
    y_SBH = StackedLayerNorm(3, 64)(7 + 5 * torch.randn(3, 10, 64))
    assert y_SBH.mean(2).abs().max() < 1e-5
    assert (y_SBH.var(2, unbiased=False) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_dropout_comes_last_in_a_layer_and_acts_in_training_only(activation, norm):
    torch.manual_seed(0)
    stack = ExpertLayers(activation=activation, norm=norm, dropout=0.25).stack(2, 5, [400])
    x_UBD = torch.randn(1, 30, 5)
    whole_SBH, dropped_SBH = stack.eval()(x_UBD), stack.train()(x_UBD)
    kept_SBH = dropped_SBH != 0
    torch.testing.assert_close(dropped_SBH[kept_SBH], (whole_SBH / 0.75)[kept_SBH])
    assert kept_SBH[whole_SBH != 0].float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(stack.eval()(x_UBD), whole_SBH)


def test_dropout_of_experts_stands_above_that_of_aitm_and_each_acts():
    x_BD, tasks = torch.randn(20, 6), ["a", "b"]
    for options, share in (({}, 0.5), ({"experts": {"dropout": 0.1}}, 0.1), ({"experts": {"norm": "layer"}}, 0.5)):
        module = build_fusion({"name": "aitm", "widths": [8], "dropout": 0.5, **options}, 6, tasks, [])
        assert (module.networks.dropout.p, module.transfers[0].dropout.p) == (share, 0.5)
        assert not torch.equal(module(x_BD), module(x_BD))


@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_defaults_written_out_build_the_same_network(name):
    size = Sizes(B=4, D=5, T=3, seed=0, levels=[[4], [3]], widths=[4, 3], tasks=2, shared=1)
    defaults = {"experts": {"activation": "relu", "norm": "none", "dropout": 0.0}}
    defaults |= {"gate": {"bias": False, "layers": []}} if name in GATED else {}
    states = []
    for options in ({}, defaults):
        torch.manual_seed(1)
        config = {key: value for key, value in {"num_experts": 2, "levels": size.levels, "widths": size.widths}.items()
                  if key in (GATED | UNGATED)[name][1]}  # fmt: skip
        states.append(build_fusion({"name": name, **config, **options}, 5, ["a", "b", "c"], []).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    # The names that checkpoints have.
    assert not [key for key in states[0] if "hidden." in key or "norms" in key or ("gate." in key and "bias" in key)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mmoe", {"experts": {"activation": "tanh"}}, r"experts\.activation: Input should be 'relu', 'gelu' or 'silu'"),
        ("ple", {"experts": {"norm": "batch"}}, r"experts\.norm: Input should be 'none' or 'layer'"),
        ("adatt", {"experts": {"dropout": 1}}, r"experts\.dropout: Input should be less than 1"),
        ("aitm", {"experts": {"width": 3}}, r"experts\.width: Extra inputs are not permitted"),
        ("single_task", {"experts": "gelu"}, r"experts: Input should be a mapping"),
        ("mmoe", {"gate": {"layers": [8, 0]}}, r"gate\.layers\.1: Input should be greater than or equal to 1"),
        ("cgc", {"gate": {"bias": "no way"}}, r"gate\.bias: Input should be a valid boolean"),
        ("ple", {"gate": {"dropout": 0.1}}, r"gate\.dropout: Extra inputs are not permitted"),
        ("single_task", {"gate": {"bias": True}}, r"gate: Unexpected keyword argument"),
        ("adatt", {"native": "always"}, r"native: .*'published'"),
    ],
)
def test_layers_that_do_not_exist_are_refused_by_their_key_in_one_line(name, options, message):
    shape = {"widths": [4]} if name in ("single_task", "aitm") else {"levels": [[4]]}
    shape |= {"num_experts": 2} if name == "mmoe" else {}
    with pytest.raises(UserError, match=rf"^(.*; )?model\.fusion\.{message}") as refused:
        build_fusion({"name": name, **shape, **options}, 5, ["a", "b"], [])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", GATED)
def test_networks_with_other_layers_can_be_traced(name):
    size = Sizes(B=4, D=5, T=3, seed=0, levels=[[4], [3]], widths=[4, 3], tasks=2, shared=1)
    module, _ = both(name, size, experts={"activation": "gelu", "norm": "layer"}, gate={"bias": True, "layers": [3]})
    x_BD = rows(size)
    # TorchRec's pipelined loop traces the model.
    assert torch.equal(torch.fx.symbolic_trace(module)(x_BD), module(x_BD))


def test_other_layers_come_close_in_bf16_and_a_broken_row_stays_alone():
    torch.manual_seed(0)
    stack = ExpertLayers(activation="silu", norm="layer").stack(4, 24, [32, 16], [1, 3])
    x_UBD = torch.randn(2, 64, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y_SBH = stack(x_UBD)
    wanted_SBH = stack.double()(x_UBD.double())
    assert (y_SBH.double() - wanted_SBH).norm() / wanted_SBH.norm() < 2e-2
    x_UBD[:, 5, 3] = torch.nan
    broken_SB = stack.float()(x_UBD).isnan().all(2)
    assert broken_SB[:, 5].all()
    assert broken_SB.sum() == 4


@st.composite
def drawn_counts(draw: st.DrawFn) -> Sizes:
    """Numbers of experts by task and by level, 0 and 1 among them."""
    size = draw(sizes)
    depth = {"min_size": len(size.levels), "max_size": len(size.levels)}
    size.tasks = draw(st.lists(st.lists(counts, min_size=size.T, max_size=size.T), **depth))
    size.shared = draw(st.lists(counts, **depth))
    assume(all(any(tasks) or shared for tasks, shared in zip(size.tasks, size.shared, strict=True)))
    return size


@settings(max_examples=examples(40), deadline=None)
@given(drawn_counts())
def test_published_native_vectors_equal_their_reference_for_any_numbers_of_experts(size):
    arguments = (size.D, size.T, size.levels, size.tasks, size.shared, "published")
    module = randomised(AdaTT(*arguments), size.seed)
    check(module, references.AdaTT(*arguments), rows(size))
    torch.autograd.grad(module(rows(size)).sum(), list(module.parameters()), allow_unused=False)


@pytest.mark.parametrize(("tasks", "shared", "learnt"), [
    (1, 0, []), (1, 1, []),  # all units have one expert
    (1, 3, [(0, [1, 1, 3]), (1, [1, 1])]), ([2, 1], 1, [(0, [2, 1, 1]), (1, [2, 1])]), (2, 0, [(0, [2, 2]), (1, [2, 2])]),
])  # fmt: skip
def test_published_native_vectors_are_learnt_for_all_units_or_none(tasks, shared, learnt):
    module = AdaTT(4, 2, [[3], [3]], tasks, shared, "published")
    found = [
        (k, level.learnt_OE.sum(1).tolist()) for k, level in enumerate(module.levels) if level.native_OE is not None
    ]
    assert found == learnt
    x_BD = torch.randn(3, 4)
    for gate_BOE, plain_BOE in zip(module.gates(x_BD), AdaTT(4, 2, [[3], [3]], tasks, shared).gates(x_BD), strict=True):
        assert gate_BOE.shape == plain_BOE.shape


@pytest.mark.parametrize("counts", [[1, 1, 5], [4, 2, 1]])
def test_published_native_vectors_start_uniform_between_plus_and_minus_one_over_the_root_of_their_length(counts):
    *tasks, shared = counts
    torch.manual_seed(0)
    starts: list[Tensor] = []
    for _ in range(300):
        level = AdaTT(1, 2, [[1], [1]], tasks, shared, "published").levels[0]
        starts.append(level.native_OE[level.learnt_OE].detach())
    start_KE = torch.stack(starts)
    for value_K, n in zip(start_KE.T, [count for count in counts for _ in range(count)], strict=True):
        bound = 1 / math.sqrt(n)
        assert value_K.abs().max() <= bound
        assert value_K.mean().abs() < 0.15 * bound
        assert value_K.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
