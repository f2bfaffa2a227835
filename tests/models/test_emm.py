"""EMM against its reference, the decomposition against a search by brute force, and cases whose answer is known."""

# Shapes: B rows, T tasks, M models, D width.

from itertools import combinations

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, randomised, rows
from references import emm as reference
from references.loops import mlp

from features.errors import UserError
from models.fusion.emm import EMM, Merge, TrainedModel, common_layers, decompose

width = st.integers(1, 4)
fillers = st.lists(width, max_size=2)
few_layers = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), min_size=1, max_size=6)


@st.composite
def structures(draw, min_tasks: int = 1, max_tasks: int = 4, one_model: bool = False) -> Sizes:
    """Models of other depths and widths that share some layers; T tasks with one to three models each, in any order."""
    shared = draw(st.lists(st.tuples(width, width), min_size=1, max_size=3))
    num_tasks = draw(st.integers(min_tasks, max_tasks))
    count_T = [1 if one_model else draw(st.integers(1, 3)) for _ in range(num_tasks)]
    tasks = draw(st.permutations([task for task, count in enumerate(count_T) for _ in range(count)]))
    one_input = draw(st.booleans())
    common_dim = draw(width)
    models = []
    for number, task in enumerate(tasks):
        widths: list[int] = []
        for low, high in shared:
            widths += [*draw(fillers), low, high]
        in_dim = common_dim if one_input else draw(width)
        models.append(TrainedModel(f"model {number}", task, in_dim, widths + draw(fillers)))
    in_dim = common_dim if one_input else sum(model.in_dim for model in models)
    size = {"B": draw(st.integers(1, 4)), "D": in_dim, "T": num_tasks, "seed": draw(st.integers(0, 10**6))}
    return Sizes(**size, models=models, one_input=one_input, merge=draw(st.booleans()))


def emm(size: Sizes) -> EMM:
    return randomised(EMM(size.D, size.T, size.models, size.one_input, size.merge), size.seed)


def columns(size: Sizes) -> list[range]:
    """What each model reads of x."""
    if size.one_input:
        return [range(size.D)] * len(size.models)
    ends = [sum(model.in_dim for model in size.models[: m + 1]) for m in range(len(size.models))]
    return [range(end - model.in_dim, end) for model, end in zip(size.models, ends, strict=True)]


@settings(max_examples=examples(100), deadline=None)
@given(structures())
def test_emm_equals_its_reference(size):
    widths = list(zip(*(parts[:-1] for parts in decompose(size.models)), strict=True))
    arguments = (size.D, size.T, size.models, size.one_input, size.merge)
    check(emm(size), reference.EMM(*arguments, widths), rows(size))


@settings(max_examples=examples(60), deadline=None)
@given(structures())
def test_weights_of_the_models_are_shares_and_every_parameter_takes_part(size):
    module = emm(size)
    for weight_BTM in module.gates(rows(size)):
        assert (weight_BTM >= 0).all()
        close(weight_BTM.sum(2), torch.ones(size.B, size.T, dtype=torch.float64))
    # Gradient buckets of a distributed run wait for every parameter.
    torch.autograd.grad(module(rows(size)).sum(), list(module.parameters()), allow_unused=False)


@settings(max_examples=examples(60), deadline=None)
@given(structures(one_model=True))
def test_one_model_a_task_without_the_merge_is_that_model(size):
    size.merge = False
    module = emm(size)
    params, x_BD = dict(module.named_parameters()), rows(size)
    for m, model in enumerate(size.models):
        whole = {}
        for level, widths in enumerate(module.widths[m]):
            for k in range(len(widths)):
                place = f"layers.{len(whole) // 2}"
                for part in ("weight_SDH", "bias_SH"):
                    whole[f"{place}.{part}"] = params[f"levels.{level}.components.{m}.layers.{k}.{part}"]
        assert len(whole) // 2 + len(module.remainders[m]) == len(model.widths)
        x_M = x_BD[:, list(columns(size)[m])]
        expected = torch.stack([mlp(whole, "", 0, len(whole) // 2, x_D) for x_D in x_M])
        close(module(x_BD)[:, model.task], expected)


@settings(max_examples=examples(40), deadline=None)
@given(structures(min_tasks=2))
def test_the_merge_is_the_only_exchange_between_tasks_above_the_first_gates(size):
    size.merge = False
    module, x_BD = emm(size), rows(size).requires_grad_()
    with torch.no_grad():
        module.get_parameter("levels.0.gate.weight_SDH").zero_()  # it reads all of x, the models only their own
    (gradient_BD,) = torch.autograd.grad(module(x_BD)[:, 0].sum(), x_BD)
    own = {column for model, read in zip(size.models, columns(size), strict=True) if model.task == 0 for column in read}
    others = [column for column in range(size.D) if column not in own]
    assert not gradient_BD[:, others].any()


def merge_of(num_tasks: int, seed: int) -> tuple[Merge, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    module = randomised(Merge(num_tasks, 3, 4), seed)
    h_TBD = torch.randn(num_tasks, 8, 4, generator=rng, dtype=torch.float64)
    x_TBD = torch.randn(num_tasks, 8, 3, generator=rng, dtype=torch.float64)
    return module, h_TBD, x_TBD


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(2, 5), st.integers(0, 10**6))
def test_a_task_picks_the_largest_of_the_others_and_never_itself(num_tasks, seed):
    module, h_TBD, x_TBD = merge_of(num_tasks, seed)
    _, _, index_TB1 = module.attend(h_TBD, x_TBD)
    score_TBT = torch.einsum("tbd,tdo->tbo", x_TBD, module.gate.weight_SDH)
    for t in range(num_tasks):
        for b in range(8):
            others = [s for s in range(num_tasks) if s != t]
            assert index_TB1[t, b] == max(others, key=lambda s, t=t, b=b: score_TBT[t, b, s])


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(2, 5), st.integers(0, 10**6))
def test_the_gate_that_picks_gets_the_gradient_of_what_is_computed(num_tasks, seed):
    module, h_TBD, x_TBD = merge_of(num_tasks, seed)
    weight = module.gate.weight_SDH
    probe = torch.randn(h_TBD.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((module(h_TBD, x_TBD) * probe).sum(), weight)
    assert gradient.any()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    values, chosen, step = [], [], 1e-6
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * step * direction
            values.append((module(h_TBD, x_TBD) * probe).sum().item())
            chosen.append(module.attend(h_TBD, x_TBD)[2])
            weight -= sign * step * direction
    if torch.equal(*chosen):  # where another task is picked there is a jump, and no gradient
        slope = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_a_merge_starts_as_a_mean_of_what_the_two_tasks_know():
    _, h_TBD, x_TBD = merge_of(2, 0)
    module = Merge(2, 3, 4).double()
    h_TBD = h_TBD.relu()
    share_T2B, value_T2BD, _ = module.attend(h_TBD, x_TBD)
    f_TBT = module.gate(x_TBD).softmax(-1)
    picked_TBD = torch.stack([f_TBT[0, :, 1:] * h_TBD[1], f_TBT[1, :, :1] * h_TBD[0]])
    close(value_T2BD, torch.stack([h_TBD, picked_TBD], 1))
    close(share_T2B.sum(1), torch.ones(2, 8, dtype=torch.float64))


def test_freezing_takes_the_components_out_of_training_and_nothing_else():
    module = EMM(5, 2, [TrainedModel("a", 0, 2, [4, 3]), TrainedModel("b", 1, 3, [6, 4, 3])])
    module.freeze()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in module.named_parameters() if ".components." not in n}
    assert any(".merge.project." in name for name in trained)


# Decomposition


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(layer in rest for layer in part)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(few_layers, min_size=1, max_size=4))
def test_common_layers_are_a_longest_common_subsequence(models_ML):
    place_LM = common_layers(models_ML)
    found = [models_ML[0][place_M[0]] for place_M in place_LM]
    for m, model in enumerate(models_ML):
        places = [place_M[m] for place_M in place_LM]
        assert places == sorted(set(places))
        assert [model[place] for place in places] == found
    longer = combinations(models_ML[0], len(found) + 1)
    assert not any(all(is_subsequence(part, model) for model in models_ML) for part in longer)


def widths_of(*models: tuple[int, list[int]]) -> list[list[list[int]]]:
    return decompose([TrainedModel(f"run {n}", n, d, widths) for n, (d, widths) in enumerate(models)])


def test_models_of_one_layer_in_common_are_cut_once_wherever_it_is():
    """The example of section III-A: the 8th layer of 18 and the 20th of 24."""
    first = [*range(101, 108), 7, 9, *range(201, 210)]
    second = [*range(301, 320), 7, 9, *range(401, 404)]
    assert (len(first), len(second)) == (18, 24)
    parts = widths_of((10, first), (10, second))
    assert parts == [[first[:9], first[9:]], [second[:21], second[21:]]]


def test_models_of_other_depth_are_cut_into_the_same_number_of_components():
    assert widths_of((9, [128, 64, 32]), (9, [256, 128, 64, 32])) == [[[128, 64], [32], []], [[256, 128, 64], [32], []]]
    assert widths_of((9, [128, 64, 32]), (9, [128, 64, 16])) == [[[128], [64], [32]], [[128], [64], [16]]]


def test_equal_models_are_cut_after_every_layer():
    assert widths_of((9, [8, 4]), (9, [8, 4])) == [[[8], [4], []]] * 2


def test_of_layers_in_another_order_only_those_in_order_are_cuts():
    assert widths_of((1, [2, 3, 2]), (5, [3, 2, 3])) == [[[2, 3, 2], []], [[3, 2], [3]]]


def test_a_layer_that_occurs_more_than_once_is_cut_as_high_as_possible():
    assert widths_of((1, [8, 8]), (2, [8, 8, 8, 8])) == [[[8, 8], []], [[8, 8, 8, 8], []]]


def test_components_of_a_level_end_in_the_same_width_and_above_the_first_begin_with_the_same():
    models = [TrainedModel("a", 0, 5, [7, 4, 3, 6, 2]), TrainedModel("b", 0, 6, [9, 4, 3, 8, 8, 6, 2, 3])]
    module = EMM(11, 1, models)
    for a, b in zip(*module.widths, strict=True):
        assert a[-1] == b[-1]
    for level in module.levels[1:]:
        assert len({c.layers[0].weight_SDH.shape[1] for c in level.components}) == 1


def test_models_without_a_common_layer_are_refused_with_their_structures():
    with pytest.raises(UserError) as refused:
        widths_of((9, [128, 64]), (9, [256, 32, 16]))
    assert "run 0 9-128-64; run 1 9-256-32-16" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_new_tables_of_another_width_than_a_model_was_trained_on_are_refused():
    models = [TrainedModel("a", 0, 5, [4]), TrainedModel("b", 1, 5, [4])]
    with pytest.raises(UserError, match="a was trained on an input of width 5, the new one has 6"):
        EMM(6, 2, models, one_input=True)
