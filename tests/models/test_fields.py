"""Fusions that read one token a feature, against their references, and what must hold of them without one."""

from pathlib import Path

import pytest
import torch
import yaml
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, drawn_sizes, load, randomised, rows, widths
from references import fields as references
from torch import Tensor

from features.errors import UserError
from models.excitation import Excitation
from models.fusion import FUSIONS, build_fusion
from models.fusion.apem import APEM
from models.fusion.dtrn import DTRN
from models.fusion.fusion import Fusion
from models.fusion.multitab import Block, MultiTab
from models.fusion.single_task import SingleTask

# Shapes: B rows, T tasks, F features, G groups, W = D width of a token.
MODELS = Path(__file__).parents[2] / "jobs/conf/model"
MASKS = ["none", "FxT", "TxT", "FxT_TxT"]
ROWS = ["none", "alone", "batch"]
FUSED = ["apem", "dtrn", "multitab"]
inside = st.integers(1, 3)
sizes = drawn_sizes(
    F=st.integers(1, 4), heads=st.integers(1, 2), share=st.integers(1, 3), layers=st.integers(1, 2), groups=inside,
    points=inside, hidden=inside, squeeze=inside, condition=inside, widths=widths, mask=st.sampled_from(MASKS),
    behaviours=st.sets(st.integers(0, 3)), rows=st.sampled_from(ROWS),
)  # fmt: skip


def behaviours(size: Sizes) -> list[int]:
    """In an order other than the features'."""
    return sorted((f for f in size.behaviours if f < size.F), reverse=True)


def apem(size: Sizes) -> APEM:
    inner = (size.layers, size.groups, size.points, size.hidden, size.squeeze)
    return randomised(APEM(size.D, size.T, size.F, size.widths, *inner), size.seed)


def dtrn(size: Sizes) -> DTRN:
    inner = (behaviours(size), size.condition, size.hidden, size.squeeze)
    return randomised(DTRN(size.D, size.T, size.F, {}, size.widths, *inner), size.seed)


def multitab(size: Sizes) -> MultiTab:
    size.D = size.heads * size.share
    inner = (size.layers, size.heads, size.hidden, size.mask, size.rows)
    return randomised(MultiTab(size.D, size.T, size.F, *inner), size.seed)


def fields(size: Sizes) -> Tensor:
    """x_BFW."""
    return rows(size, size.F, size.D)


def small(**changes: object) -> Sizes:
    common = {"B": 3, "D": 4, "T": 3, "F": 4, "seed": 5, "heads": 2, "share": 2, "layers": 2, "groups": 2, "points": 2}
    common |= {"hidden": 3, "squeeze": 2, "condition": 2, "widths": [5, 3], "mask": "TxT", "behaviours": {1, 3}}
    common |= {"rows": "none"}
    return Sizes(**(common | changes))


@settings(max_examples=examples(20), deadline=None)
@given(sizes)
def test_apem_equals_its_reference(size):
    inner = (size.layers, size.groups, size.points, size.hidden, size.squeeze)
    check(apem(size), references.APEM(size.D, size.T, size.F, size.widths, *inner), fields(size))


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_dtrn_equals_its_reference(size):
    inner = (behaviours(size), size.condition, size.hidden, size.squeeze)
    check(dtrn(size), references.DTRN(size.D, size.T, size.F, size.widths, *inner), fields(size))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_multitab_equals_its_reference_under_every_mask_and_kind_of_rows(size):
    module, inner = multitab(size), (size.layers, size.heads, size.hidden, size.mask, size.rows)
    check(module, references.MultiTab(size.D, size.T, size.F, *inner), fields(size))


@pytest.mark.parametrize("rows", ["alone", "batch"])
def test_multitab_drops_what_its_reference_drops(rows):
    size = small(layers=1, hidden=16)
    module = randomised(MultiTab(4, 3, 4, 1, 2, 16, "TxT", rows, dropout=0.4, attention_dropout=0.3), size.seed)
    twin = references.MultiTab(4, 3, 4, 1, 2, 16, "TxT", rows, 0.4, 0.3).double()
    twin.load_state_dict(dict(module.named_parameters()), strict=False)
    torch.manual_seed(3)
    found_BTW = module(fields(size))
    torch.manual_seed(3)
    close(found_BTW, torch.stack(twin(fields(size)), 1))
    assert not torch.allclose(module(fields(size)), found_BTW)
    assert torch.equal(module.eval()(fields(size)), module(fields(size)))


@pytest.mark.parametrize("allowed", [True, False])
def test_a_block_of_multitab_is_torchs_attention_and_a_gelu_network(allowed):
    block = randomised(Block(6, 2, 5, None), 4)
    x_NPD = torch.randn(3, 7, 6, dtype=torch.float64)
    allowed_PP = torch.rand(7, 7) < 0.6
    allowed_PP |= torch.eye(7, dtype=torch.bool)
    attention = torch.nn.MultiheadAttention(6, 2, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([block.query.weight, block.value.weight]))
        attention.in_proj_bias.copy_(torch.cat([block.query.bias, block.value.bias]))
    load(attention.out_proj, block.out.state_dict())
    y_NPD = block.norm(x_NPD)
    z_NPD = x_NPD + attention(y_NPD, y_NPD, y_NPD, attn_mask=~allowed_PP if allowed else None)[0]
    network = torch.nn.Sequential(block.forward_norm, block.up, torch.nn.GELU(), block.down)
    close(block(x_NPD, allowed_PP if allowed else None), z_NPD + network(z_NPD))


@pytest.mark.parametrize("mode", ROWS)
def test_multitab_starts_as_its_authors_code(mode):
    """N(0, 0.01^2), but for Glorot's uniform of queries, keys and values; biases 0, norms 1."""
    for name, value in MultiTab(32, 32, 3, layers=1, hidden=64, rows=mode).named_parameters():
        width, (layer, kind) = value.shape[-1], name.split(".")[-2:] if "." in name else ("", name)
        if kind == "bias" or "norm" in layer:
            assert torch.equal(value, torch.full_like(value, float(kind != "bias"))), name
        elif layer in ("query", "value") and (mode == "batch" or "row" not in name):
            bound = (6 / (4 * width)) ** 0.5
            assert 0.98 * bound < value.abs().max() <= bound, name
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.08), name
        else:
            assert value.std().item() == pytest.approx(0.01, rel=0.08), name


def test_without_a_std_multitab_starts_as_linear_layers():
    module = MultiTab(64, 32, 3, layers=1, hidden=64, std=None)
    assert module.task_TW.std().item() == pytest.approx(1, rel=0.1)
    for value in (module.blocks[0].value.weight, module.blocks[0].up.weight, module.blocks[0].up.bias):
        assert 0.9 / 8 < value.abs().max() <= 1 / 8


@pytest.mark.parametrize("mode", ROWS)
def test_rows_of_multitab_meet_only_with_rows_batch(mode):
    module, x_BFW = multitab(size := small(rows=mode)), fields(small())
    alone = torch.cat([module(x_1FW) for x_1FW in x_BFW.split(1)])
    assert torch.allclose(alone, module(x_BFW), rtol=0, atol=1e-10) == (mode != "batch")
    order = [2, 0, 1]
    close(module(x_BFW[order]), module(x_BFW)[order])
    assert module(x_BFW).shape == (size.B, size.T, size.D)


@settings(max_examples=examples(30), deadline=None)
@given(sizes, st.data())
def test_multitab_does_not_know_the_order_of_the_features(size, data):
    size.rows = "none"  # a block over rows reads the features at their places
    order = list(data.draw(st.permutations(range(size.F))))
    module, x_BFW = multitab(size), fields(size)
    close(module(x_BFW[:, order]), module(x_BFW))
    close(module.gates(x_BFW[:, order])[0], module.gates(x_BFW)[0][:, :, order])


@settings(max_examples=examples(30), deadline=None)
@given(sizes, st.data())
def test_features_of_apem_and_dtrn_in_another_order_with_their_parameters_change_nothing(size, data):
    order = list(data.draw(st.permutations(range(size.F))))
    chosen, x_BFW = behaviours(size), fields(size)
    for build in (apem, dtrn):
        module = build(size)
        state = {}
        for name, value in module.state_dict().items():
            if "excitation.squeeze.weight" in name:
                value = value[:, order]
            elif "excitation.excite" in name:
                value = value[..., order]
            elif name == "networks.layers.0.weight_SDH":
                value = value.unflatten(1, (size.F, size.D))[:, order].flatten(1, 2)
            state[name] = value
        if build is apem:
            other = apem(size)
        else:  # its feature f is the former order[f]
            moved = [order.index(f) for f in chosen]
            other = DTRN(size.D, size.T, size.F, {}, size.widths, moved, size.condition, size.hidden, size.squeeze)
        close(load(other, state)(x_BFW[:, order]), module(x_BFW))
        close(other.gates(x_BFW[:, order])[0], module.gates(x_BFW)[0][:, :, order])


def tokens_before(module: MultiTab, x_BFW: Tensor, task_TW: Tensor) -> Tensor:
    """What the first block makes of all tokens, with these tokens for the tasks."""
    x_BSW = torch.cat([task_TW.expand(len(x_BFW), -1, -1), x_BFW], 1)
    return module.blocks[0](x_BSW, module.allowed_SS)


@pytest.mark.parametrize("mask", MASKS)
def test_other_tasks_tokens_reach_features_and_tasks_as_far_as_the_mask_lets_them(mask):
    module = multitab(size := small(mask=mask))
    before = tokens_before(module, fields(size), module.task_TW)
    task_TW = module.task_TW.detach().clone()
    task_TW[1] += 1
    after = tokens_before(module, fields(size), task_TW)
    same = [torch.equal(after[:, s], before[:, s]) for s in range(size.T + size.F)]
    assert same[: size.T] == ["TxT" in mask, False, "TxT" in mask]
    assert same[size.T :] == ["FxT" in mask] * size.F


@pytest.mark.parametrize("mask", MASKS)
def test_a_task_is_alone_with_the_features_only_where_both_masks_hold(mask):
    module = multitab(size := small(mask=mask))
    before = module(fields(size))
    with torch.no_grad():
        module.task_TW[1] += 1
    same = [torch.equal(module(fields(size))[:, t], before[:, t]) for t in range(size.T)]
    assert same == [mask == "FxT_TxT", False, mask == "FxT_TxT"]


def test_with_one_block_tasks_are_alone_as_soon_as_they_do_not_look_at_each_other():
    module = multitab(size := small(mask="TxT", layers=1))
    before = module(fields(size))
    with torch.no_grad():
        module.task_TW[1] += 1
    assert torch.equal(module(fields(size))[:, [0, 2]], before[:, [0, 2]])


@pytest.mark.parametrize("build", [apem, dtrn, multitab])
def test_a_row_does_not_depend_on_the_others(build):
    size = small()
    module, x_BFW = build(size), fields(size)
    close(torch.cat([module(x_1FW) for x_1FW in x_BFW.split(1)]), module(x_BFW))


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_attention_to_features_is_all_that_a_task_does_not_give_to_tasks(size):
    (weight_BTF,) = multitab(size).gates(fields(size))
    assert weight_BTF.shape == (size.B, size.T, size.F)
    assert (weight_BTF > 0).all()
    assert (weight_BTF.sum(2) < 1 + 1e-12).all()  # the rest may be less than rounding error


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_what_a_task_of_apem_takes_of_all_features_sums_to_one(size):
    (weight_BTF,) = apem(size).gates(fields(size))
    assert (weight_BTF >= 0).all()
    close(weight_BTF.sum(2), torch.ones(size.B, size.T, dtype=torch.float64))


@settings(max_examples=examples(30), deadline=None)
@given(sizes, st.sampled_from([1.0, 1e6]))
def test_gates_of_an_excitation_stay_between_0_and_2_and_start_at_1(size, scale):
    module = Excitation(size.T, size.F, size.squeeze).double()
    x_SBFW = scale * fields(size).expand(size.T, -1, -1, -1)
    assert torch.equal(module(x_SBFW), torch.ones(size.T, size.B, size.F, dtype=torch.float64))
    gate_SBF = randomised(module, size.seed)(x_SBFW)
    assert ((gate_SBF >= 0) & (gate_SBF <= 2)).all()
    (gate_BTF,) = dtrn(size).gates(fields(size))
    assert ((gate_BTF >= 0) & (gate_BTF <= 2)).all()


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_dtrn_with_gates_of_one_and_no_behaviours_is_single_task_networks(size):
    size.behaviours = set()
    module = DTRN(size.D, size.T, size.F, {}, size.widths, None, squeeze=size.squeeze).double()  # gates start at 1
    state = {name: value for name, value in module.state_dict().items() if name.startswith("networks")}
    other = load(SingleTask(size.F * size.D, size.T, size.widths), state)
    close(module(fields(size)), other(fields(size).flatten(1)))
    assert torch.equal(module.gates(fields(size))[0], torch.ones(size.B, size.T, size.F, dtype=torch.float64))


def test_only_behaviours_are_read_anew_and_differently_by_each_task():
    size = small(behaviours={1, 3}, hidden=16)
    x_TBFW, x_BFW = dtrn(size)._read(fields(size)), fields(size)
    for t in range(size.T):
        assert torch.equal(x_TBFW[t][:, [0, 2]], x_BFW[:, [0, 2]])
        assert not torch.isclose(x_TBFW[t][:, [1, 3]], x_BFW[:, [1, 3]]).all(2).any()
        assert not torch.isclose(x_TBFW[t][:, [1, 3]], x_TBFW[t - 1][:, [1, 3]]).all(2).any()


def test_a_behaviour_costs_dtrn_no_parameters_but_its_embedding():
    few, many = (sum(p.numel() for p in dtrn(small(behaviours=chosen)).parameters()) for chosen in ({1}, {0, 1, 2, 3}))
    assert many - few == 3 * small().condition


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_apem_of_one_group_that_changes_nothing_reads_the_features_with_its_selector_alone(size):
    size.groups = 1
    module, x_BFW = apem(size), fields(size)
    with torch.no_grad():
        for name, value in module.blocks.named_parameters():
            if ".out." in name or ".down." in name or ".excite." in name:
                value.zero_()
    x_TBD = (size.F * module.gates(x_BFW)[0].unsqueeze(3) * x_BFW.unsqueeze(1)).transpose(0, 1).flatten(2)
    close(module(x_BFW), module.networks(x_TBD).transpose(0, 1))


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_groups_of_apem_with_the_same_parameters_find_the_same_as_one(size):
    size.groups = 1
    one = apem(size)
    size.groups = 3
    state = {n: v.repeat_interleave(3, 0) if n.startswith("blocks.") else v for n, v in one.state_dict().items()}
    close(load(apem(size), state)(fields(size)), one(fields(size)))


@pytest.mark.parametrize("build", [apem, dtrn, multitab])
@settings(max_examples=examples(20), deadline=None)
@given(sizes, st.data())
def test_tasks_in_another_order_give_outputs_in_that_order(build, size, data):
    size.rows = "none"
    tasks = list(data.draw(st.permutations(range(size.T))))
    module = build(size)
    own = ("task_TW", "indicator_TW", "networks.", "excitation.", "interests.task_TC")
    state = {name: v[tasks] if name.startswith(own) else v for name, v in module.state_dict().items()}
    close(load(build(size), state)(fields(size)), module(fields(size))[:, tasks])


@pytest.mark.parametrize("name", FUSED)
def test_a_shipped_config_builds_learns_everywhere_and_can_be_traced(name):
    config = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    config["fusion"] |= {"behaviours": ["c", "a"]} if name == "dtrn" else {}
    module: Fusion = build_fusion(config["fusion"], config["field_dim"], ["s", "t"], ["a", "b", "c"])
    x_BFW = torch.randn(64, 3, config["field_dim"])
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))  # away from gates that start at exactly 1
    h_BTD = module(x_BFW)
    assert h_BTD.shape == (64, 2, module.out_dim)
    h_BTD.square().sum().backward()
    for parameter, value in module.named_parameters():
        assert value.grad.any(), parameter
    # TorchRec's pipelined loop traces what it runs.
    assert torch.equal(torch.fx.symbolic_trace(module)(x_BFW), h_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x_BFW).isfinite().all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"name": "dtrn", "widths": [3], "behaviours": ["b", "d"]},
            ["model.fusion.behaviours", "d is not one of a, b, c"],
        ),
        ({"name": "dtrn", "widths": [3], "behaviours": ["b", "b"]}, ["model.fusion.behaviours", "twice"]),
        ({"name": "multitab", "heads": 3}, ["model.fusion.heads", "field_dim 4", "multiple of 3"]),
        ({"name": "multitab", "heads": 0}, ["model.fusion.heads", "greater than or equal to 1"]),
        ({"name": "multitab", "rows": "all"}, ["model.fusion.rows", "'batch'"]),
        ({"name": "multitab", "mask": "TxF"}, ["model.fusion.mask", "'FxT_TxT'"]),
        ({"name": "apem", "widths": [3], "groups": 0}, ["model.fusion.groups", "greater than or equal to 1"]),
        ({"name": "apem"}, ["model.fusion.widths"]),
    ],
)
def test_what_such_a_fusion_does_not_take_is_said_in_one_line(config, words):
    with pytest.raises(UserError) as caught:
        build_fusion(config, 4, ["s", "t"], ["a", "b", "c"])
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_behaviours_are_found_by_the_names_of_features():
    config = {"name": "dtrn", "widths": [3], "behaviours": ["c", "a"]}
    assert build_fusion(config, 4, ["s", "t"], ["a", "b", "c"]).behaviour_K.tolist() == [2, 0]
    assert all(FUSIONS[name].fields for name in FUSED)
