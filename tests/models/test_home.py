"""HoME against its reference, its mask, and what must hold of it without one."""

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, check_gates, close, drawn_sizes, randomised, rows, widths
from references.home import home as reference
from torch import Tensor

from features.errors import UserError
from models.fusion import build_fusion
from models.fusion.home import FeatureGates, HoME, Level

# Shapes: B rows, T tasks, G groups and the shared unit, C categories of experts, E experts of a level, D width.
count = st.integers(1, 2)
sizes = drawn_sizes(
    levels=st.lists(widths, min_size=2, max_size=2), experts=count, rank=count, loras=count,
    group_of=st.lists(st.integers(0, 2), min_size=4, max_size=4),
)  # fmt: skip


def groups(size: Sizes) -> list[list[int]]:
    """Of tasks, each in the order of the draw; the first of a group is its last task."""
    found = [[t for t in reversed(range(size.T)) if size.group_of[t] == g] for g in range(3)]
    return [group for group in found if group]


def build(size: Sizes) -> HoME:
    arguments = (size.D, size.T, size.levels, groups(size), size.experts, size.rank, size.loras)
    return randomised(HoME(*arguments), size.seed)


def small(**changes: object) -> Sizes:
    common = {"B": 4, "D": 5, "T": 3, "seed": 3, "levels": [[6, 4], [3]], "experts": 2, "rank": 2, "loras": 2}
    return Sizes(**(common | {"group_of": [0, 1, 0]} | changes))


@settings(max_examples=examples(20), deadline=None)
@given(sizes)
def test_home_equals_its_reference(size):
    module, depths = build(size), [len(layers) for layers in size.levels]

    def twin(params: dict[str, Tensor], x_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        return reference(params, x_BD, groups(size), depths, size.experts, size.loras)

    check(module, lambda params, x_BD: twin(params, x_BD)[0], rows(size))
    check_gates(module.gates(rows(size)), twin(dict(module.named_parameters()), rows(size))[1])


def learning(module: HoME | Level, level: str, loss: Tensor) -> list[bool]:
    """Of each category of a level, whether its experts have a gradient."""
    parameters = {n: p for n, p in module.named_parameters() if n.startswith(f"{level}experts.")}
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
    stacks = [gradient.flatten(1).any(1).view(-1, 2).any(1) for gradient in gradients]  # two experts a category
    return torch.stack(stacks).any(0).tolist()


@pytest.mark.parametrize(("task", "sees"), [
    # Categories: three tasks, the groups [2, 0] and [1], all.
    (0, [True, False, False, True, False, True]),
    (1, [False, True, False, False, True, True]),
    (2, [False, False, True, True, False, True]),
])  # fmt: skip
def test_only_experts_of_the_task_its_group_and_the_shared_ones_learn_from_a_tasks_loss(task, sees):
    module = build(small())
    loss = module(rows(small()))[:, task].square().sum()
    assert learning(module, "of_tasks.", loss) == sees


def test_at_the_first_level_a_group_trains_its_own_and_the_shared_experts_and_the_shared_unit_trains_all():
    size = small()
    level, x_1BD = build(size).of_groups, rows(size).unsqueeze(0)
    z_GBD = level(x_1BD, x_1BD)
    found = [learning(level, "", z_BD.square().sum()) for z_BD in z_GBD.unbind()]
    assert found == [[True, False, True], [False, True, True], [True, True, True]]


@settings(max_examples=examples(30), deadline=None)
@given(sizes)
def test_gates_add_a_self_gate_to_a_softmax_and_are_zero_on_what_is_hidden(size):
    first_BUE, second_BTE = build(size).gates(rows(size))
    found, tasks = groups(size), size.T
    group_of = {t: g for g, group in enumerate(found) for t in group}
    assert first_BUE.shape == (size.B, tasks + 1, size.experts * (len(found) + 1))
    assert second_BTE.shape == (size.B, tasks, size.experts * (tasks + len(found) + 1))
    for t in range(tasks):
        seen = {"first": {group_of[t], len(found)}, "second": {t, tasks + group_of[t], tasks + len(found)}}
        for weight_BE, sees in ((first_BUE[:, t], seen["first"]), (second_BTE[:, t], seen["second"])):
            hidden = [e for e in range(weight_BE.shape[1]) if e // size.experts not in sees]
            assert not weight_BE[:, hidden].any()
            assert ((weight_BE.sum(1) > 1) & (weight_BE.sum(1) <= 2 + 1e-12)).all()
            if size.experts > 1:
                close(weight_BE.sum(1), torch.full_like(weight_BE[:, 0], 2))


def test_feature_gates_of_small_inputs_are_near_one_and_all_stay_between_zero_and_two():
    gates, x_BD = FeatureGates(3, 5, 2, 2).double(), rows(small())
    torch.testing.assert_close(gates(1e-3 * x_BD.unsqueeze(0)), 1e-3 * x_BD.expand(3, -1, -1), rtol=1e-2, atol=0)
    scale_CBD = randomised(gates, 1)(x_BD.unsqueeze(0)) / x_BD
    assert ((scale_CBD > 0) & (scale_CBD < 2)).all()
    assert len(scale_CBD.unique(dim=0)) == 3


def test_a_row_does_not_depend_on_the_others_while_training():
    module, x_BD = build(small()).train(), rows(small())
    close(torch.cat([module(x_1D) for x_1D in x_BD.split(1)]), module(x_BD))


def test_outputs_of_fresh_experts_are_distributed_alike_whatever_the_scale_of_their_weights():
    torch.manual_seed(0)
    module = HoME(8, 2, [[64], [32]]).of_groups.experts.double()
    with torch.no_grad():
        module[0].linear.weight_SDH[0] *= 1000
    y_SBH = module(torch.randn(1, 50, 8, dtype=torch.float64))
    # Half of a standard normal variable's Swish is below 0; its mean is .207.
    torch.testing.assert_close(y_SBH.mean((1, 2)), torch.full((4,), 0.207, dtype=torch.float64), rtol=0, atol=0.05)


def test_groups_are_given_by_names_and_default_to_one_of_all():
    config = {"name": "home", "levels": [[4], [3]]}
    module = build_fusion(config | {"groups": [["c"], ["b", "a"]]}, 5, list("abc"), [])
    assert module.group_T.tolist() == [1, 1, 0]
    assert build_fusion(config, 5, list("abc"), []).group_T.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("changes", "words"), [
    ({"groups": [["a", "b"], ["c", "d"]]}, "model.fusion.groups: d is not one of a, b, c"),
    ({"groups": [["a"], ["b"]]}, "model.fusion.groups: must be lists that name each of the 3 tasks exactly once"),
    ({"groups": [["a", "b"], ["c", "a"]]}, "model.fusion.groups: must be lists that name each of the 3 tasks exactly once"),
    ({"groups": [["a", "b", "c"], []]}, "model.fusion.groups: must be lists that name each of the 3 tasks exactly once"),
    ({"groups": ["a", "b", "c"]}, "such as [[a, b], [c]], or null"),
    ({"levels": [[4]]}, "model.fusion.levels: home has two levels, of groups and of tasks, not 1"),
    ({"levels": [[4], []]}, "model.fusion.levels: "), ({"levels": [[4], [1]]}, "model.fusion.levels: "),
    ({"experts": 0}, "model.fusion.experts: "), ({"rank": 0}, "model.fusion.rank: "), ({"loras": 0}, "model.fusion.loras: "),
])  # fmt: skip
def test_what_home_does_not_take_is_said_in_one_line(changes, words):
    with pytest.raises(UserError) as caught:
        build_fusion({"name": "home", "levels": [[4], [3]]} | changes, 5, list("abc"), [])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
