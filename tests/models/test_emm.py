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
from models.chains import chain_of
from models.fusion import build_fusion
from models.fusion.decomposition import TrainedModel, common_widths, decompose, places
from models.fusion.emm import EMM, Merge

width = st.integers(1, 4)
fillers = st.lists(width, max_size=2)
few_widths = st.lists(st.integers(1, 3), min_size=1, max_size=6)
projections = st.sampled_from(["relu", "linear"])


@st.composite
def structures(draw, min_tasks: int = 1, max_tasks: int = 4, one_model: bool = False) -> Sizes:
    """Models of other depths and widths that share some layers; T tasks with one to three models each, in any order."""
    shared = draw(st.lists(width, min_size=1, max_size=3))
    num_tasks = draw(st.integers(min_tasks, max_tasks))
    count_T = [1 if one_model else draw(st.integers(1, 3)) for _ in range(num_tasks)]
    tasks = draw(st.permutations([task for task, count in enumerate(count_T) for _ in range(count)]))
    one_input = draw(st.booleans())
    common_dim = draw(width)
    models = []
    for number, task in enumerate(tasks):
        widths: list[int] = []
        for common in shared:
            widths += [*draw(fillers), common]
        in_dim = common_dim if one_input else draw(width)
        models.append(TrainedModel(f"model {number}", task, in_dim, widths + draw(fillers), draw(fillers)))
    in_dim = common_dim if one_input else sum(model.in_dim for model in models)
    size = {"B": draw(st.integers(1, 4)), "D": in_dim, "T": num_tasks, "seed": draw(st.integers(0, 10**6))}
    merge, projection = draw(st.booleans()), draw(projections)
    return Sizes(**size, models=models, one_input=one_input, merge=merge, projection=projection)


def emm(size: Sizes) -> EMM:
    return randomised(EMM(size.D, size.T, size.models, size.one_input, size.merge, size.projection), size.seed)


def columns(size: Sizes) -> list[range]:
    """What each model reads of x."""
    if size.one_input:
        return [range(size.D)] * len(size.models)
    ends = [sum(model.in_dim for model in size.models[: m + 1]) for m in range(len(size.models))]
    return [range(end - model.in_dim, end) for model, end in zip(size.models, ends, strict=True)]


@settings(max_examples=examples(60), deadline=None)
@given(structures())
def test_emm_equals_its_reference(size):
    widths = list(zip(*(parts[:-1] for parts in decompose(size.models)), strict=True))
    arguments = (size.D, size.T, size.models, size.one_input, size.merge, size.projection)
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
        assert len(whole) // 2 + len(module.remainders[m]) == len(model.widths) + len(model.tower)
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


def merge_of(num_tasks: int, seed: int, projection: str = "relu") -> tuple[Merge, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    module = randomised(Merge(num_tasks, 3, 4, projection), seed)
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


def gate_weight(weight: torch.Tensor, x_D: torch.Tensor, task: int, picked: int) -> torch.Tensor:
    """f of the picked task, from the weights of a task's fusion gate."""
    return torch.einsum("d,do->o", x_D, weight[task]).softmax(0)[picked]


def merged_row(module: Merge, task: int, own_D: torch.Tensor, picked_D: torch.Tensor) -> torch.Tensor:
    """Eq. 4-6 of one row, with what was picked as it is given."""
    weight, bias, dim = module.project.weight_SDH[task], module.project.bias_SH, len(own_D)
    scores, values = [], []
    for w_D in (own_D, picked_D):
        y = w_D @ weight if bias is None else (w_D @ weight + bias[task]).clamp(min=0)
        scores.append((y[:dim] * y[dim : 2 * dim]).sum() / dim**0.5)
        values.append(y[2 * dim :])
    share = torch.stack(scores).softmax(0)
    return share[0] * values[0] + share[1] * values[1]


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(2, 5), projections, st.integers(0, 10**6))
def test_the_gate_gets_the_gradient_of_scaling_what_it_picked_by_its_own_change(num_tasks, projection, seed):
    module, h_TBD, x_TBD = merge_of(num_tasks, seed, projection)
    weight = module.gate.weight_SDH
    rng = torch.Generator().manual_seed(seed + 1)
    probe, direction = (torch.randn(s, generator=rng, dtype=torch.float64) for s in (h_TBD.shape, weight.shape))
    z_TBD = module(h_TBD, x_TBD)
    (gradient,) = torch.autograd.grad((z_TBD * probe).sum(), weight)
    index_TB1, step, slope = module.attend(h_TBD, x_TBD)[2], 1e-6, 0.0
    with torch.no_grad():
        for t in range(num_tasks):
            for b in range(8):
                x_D, picked = x_TBD[t, b], int(index_TB1[t, b])
                close(merged_row(module, t, h_TBD[t, b], h_TBD[picked, b]), z_TBD[t, b], "what was picked counts once")
                now = gate_weight(weight, x_D, t, picked)
                for sign in (1, -1):
                    factor = gate_weight(weight + sign * step * direction, x_D, t, picked) / now
                    z_D = merged_row(module, t, h_TBD[t, b], factor * h_TBD[picked, b])
                    slope += sign * (z_D * probe[t, b]).sum().item() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_a_gate_that_all_but_ignores_the_others_still_hands_on_what_it_picks():
    module, h_TBD, x_TBD = merge_of(3, 0)
    wanted = module(h_TBD, x_TBD)
    with torch.no_grad():
        for task in range(3):
            module.gate.weight_SDH[task, 0, task] += 5000
    x_TBD[:, :, 0] = x_TBD[:, :, 0].abs() + 1  # so that each task's own f is 1 and f of the others 0
    index_TB1 = module.attend(h_TBD, x_TBD)[2]
    assert (module.gate(x_TBD).softmax(-1).gather(-1, index_TB1) == 0).all()
    found = module(h_TBD, x_TBD)
    (gradient,) = torch.autograd.grad(found.sum(), module.gate.weight_SDH)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    same = index_TB1 == merge_of(3, 0)[0].attend(*merge_of(3, 0)[1:])[2]
    close(found[same.squeeze(2)], wanted[same.squeeze(2)])
    assert same.any()


@pytest.mark.parametrize("num_tasks", [2, 4, 8, 16])
def test_a_merge_starts_as_a_mean_of_what_two_tasks_know_whatever_the_number_of_tasks(num_tasks):
    _, h_TBD, x_TBD = merge_of(num_tasks, 0)
    module = Merge(num_tasks, 3, 4).double()
    h_TBD = h_TBD.relu()
    share_T2B, value_T2BD, index_TB1 = module.attend(h_TBD, x_TBD)
    picked_TBD = torch.stack([torch.stack([h_TBD[index_TB1[t, b, 0], b] for b in range(8)]) for t in range(num_tasks)])
    close(value_T2BD, torch.stack([h_TBD, picked_TBD], 1))
    close(share_T2B.sum(1), torch.ones(num_tasks, 8, dtype=torch.float64))


def test_linear_projections_have_neither_bias_nor_activation():
    module, h_TBD, x_TBD = merge_of(2, 0, "linear")
    assert module.project.bias_SH is None
    value_T2BD = module.attend(h_TBD, x_TBD)[1]
    assert (value_T2BD < 0).any()
    close(module.attend(-h_TBD, x_TBD)[1], -value_T2BD)
    assert (merge_of(2, 0)[0].attend(h_TBD, x_TBD)[1] >= 0).all()


def test_freezing_takes_the_components_out_of_training_and_nothing_else():
    module = EMM(5, 2, [TrainedModel("a", 0, 2, [4, 3]), TrainedModel("b", 1, 3, [6, 4, 3])])
    module.freeze()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in module.named_parameters() if ".components." not in n}
    assert any(".merge.project." in name for name in trained)


# Decomposition


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(width in rest for width in part)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(few_widths, min_size=1, max_size=4))
def test_common_widths_are_a_longest_common_subsequence(widths_M):
    found = common_widths(widths_M)
    assert all(is_subsequence(found, widths) for widths in widths_M)
    longer = combinations(widths_M[0], len(found) + 1)
    assert not any(all(is_subsequence(part, widths) for widths in widths_M) for part in longer)


@settings(max_examples=examples(200), deadline=None)
@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_a_model_is_cut_as_high_as_possible_and_below_that_as_evenly_as_possible(data, widths):
    chosen = data.draw(st.sets(st.integers(0, len(widths) - 1), min_size=1))
    cut_L = [widths[place] for place in sorted(chosen)]
    ways = [way for way in combinations(range(len(widths)), len(cut_L)) if [widths[place] for place in way] == cut_L]

    def rank(way):
        return -way[-1], sum((high - low) ** 2 for low, high in zip((-1, *way), way, strict=False)), way

    assert places(widths, cut_L) == list(min(ways, key=rank))


def widths_of(*models: tuple[list[int], list[int]]) -> list[list[list[int]]]:
    return decompose([TrainedModel(f"run {n}", n, 9, *model) for n, model in enumerate(models)])


@pytest.mark.parametrize(
    ("first", "second", "tower"), [([8, 8], [16, 8], [8]), ([128, 64], [256, 64], [32])], ids=["census", "ali-ccp"]
)
def test_the_papers_models_have_three_components_each(first, second, tower):
    """Section IV-C; the widths are those of the authors' code, whose models are a component three times and a tower."""
    found = widths_of((3 * first, tower), (3 * second, tower), (3 * first, tower), (3 * second, tower))
    assert found == [[first, first, first, tower], [second, second, second, tower]] * 2


def test_models_of_one_width_in_common_are_cut_once_wherever_it_is():
    """The example of section III-A: the 8th layer of 18 and the 20th of 24; the second component is what is left above."""
    first = [*range(101, 108), 9, *range(201, 211)]
    second = [*range(301, 320), 9, *range(401, 405)]
    assert (len(first), len(second)) == (18, 24)
    assert widths_of((first, []), (second, [])) == [[first[:8], first[8:]], [second[:20], second[20:]]]


def test_models_of_other_depth_are_cut_into_the_same_number_of_components():
    parts = widths_of(([128, 64, 32], []), ([256, 128, 64, 32], [7]))
    assert parts == [[[128], [64], [32], []], [[256, 128], [64], [32], [7]]]
    assert widths_of(([128, 64, 32], []), ([128, 64, 16], [])) == [[[128], [64], [32]], [[128], [64], [16]]]


def test_equal_models_are_cut_after_every_layer_below_their_towers():
    assert widths_of(([8, 4], [4]), ([8, 4], [4])) == [[[8], [4], [4]]] * 2


def test_towers_are_never_cut():
    assert widths_of(([8], [4, 2]), ([8, 4], [2])) == [[[8], [4, 2]], [[8], [4, 2]]]


def test_of_widths_in_another_order_only_those_in_order_are_cuts():
    assert widths_of(([2, 3, 2], []), ([3, 2, 3], [])) == [[[2, 3], [2], []], [[3], [2], [3]]]


def test_of_more_layers_than_cuts_every_component_gets_its_share():
    assert widths_of(([8] * 6, []), ([16, 8] * 3, [])) == [[[8, 8]] * 3 + [[]], [[16, 8]] * 3 + [[]]]
    assert widths_of(([8] * 5, []), ([8, 8], [])) == [[[8, 8], [8, 8, 8], []], [[8], [8], []]]


def test_components_of_a_level_end_in_the_same_width_and_above_the_first_begin_with_the_same():
    models = [TrainedModel("a", 0, 5, [7, 4, 3, 6, 2]), TrainedModel("b", 0, 6, [9, 4, 3, 8, 8, 6, 2, 3])]
    module = EMM(11, 1, models)
    for a, b in zip(*module.widths, strict=True):
        assert a[-1] == b[-1]
    for level in module.levels[1:]:
        assert len({c.layers[0].weight_SDH.shape[1] for c in level.components}) == 1


def test_models_without_a_common_width_are_refused_with_their_structures():
    with pytest.raises(UserError) as refused:
        widths_of(([128, 64], [16]), ([256, 32], [16]))
    assert "run 0 128-64; run 1 256-32" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_new_tables_of_another_width_than_a_model_was_trained_on_are_refused():
    models = [TrainedModel("a", 0, 5, [4]), TrainedModel("b", 1, 5, [4])]
    with pytest.raises(UserError, match="a was trained on an input of width 5, the new one has 6"):
        EMM(6, 2, models, one_input=True)


# Sources


ONE_EXPERT = {"task_experts": 1, "shared_experts": 0}
CHAINS = [
    {"name": "shared_bottom", "widths": [4, 3]},
    {"name": "single_task", "widths": [4, 3]},
    {"name": "aitm", "widths": [4, 3], "chain": ["click"]},
    {"name": "mmoe", "num_experts": 1, "levels": [[4, 3]]},
    {"name": "ml_mmoe", "num_experts": 1, "levels": [[4], [3, 2]]},
    {"name": "cgc", "levels": [[4, 3]], **ONE_EXPERT},
    {"name": "ple", "levels": [[4], [3, 2]], **ONE_EXPERT},
    {"name": "ple", "levels": [[4], [3]], "task_experts": 0, "shared_experts": 1},
    {"name": "adatt", "levels": [[4], [3, 2]], "native": False, **ONE_EXPERT},
]
NO_CHAINS = [
    {"name": "mmoe", "num_experts": 2, "levels": [[4]]},
    {"name": "ple", "levels": [[4], [3]]},  # by default one expert of the task and one shared
    {"name": "ple", "levels": [[4], [3]], "task_experts": [[1], [2]], "shared_experts": 0},
    {"name": "adatt", "levels": [[4], [3]], **ONE_EXPERT},
    {"name": "cross_stitch", "levels": [[4], [3]]},
]


def chain_output(module: torch.nn.Module, names: list[str], x_BD: torch.Tensor) -> torch.Tensor:
    for name in names:
        layer = module.get_submodule(name)
        x_BD = (x_BD @ layer.weight_SDH[0] + layer.bias_SH[0]).clamp(min=0)
    return x_BD


@pytest.mark.parametrize("config", CHAINS, ids=lambda config: config["name"])
def test_a_fusion_that_is_a_chain_for_one_task_computes_its_layers_and_nothing_else(config):
    module = randomised(build_fusion(config, 5, ["click"], []), 1)
    x_BD = rows(Sizes(B=7, D=5, seed=2))
    layers = chain_of(config)
    close(module(x_BD)[:, 0], chain_output(module, [layer.name for layer in layers], x_BD))
    widths = config.get("widths") or [width for level in config["levels"] for width in level]
    assert [layer.width for layer in layers] == widths


@pytest.mark.parametrize("config", NO_CHAINS, ids=lambda config: config["name"])
def test_a_fusion_with_anything_between_its_layers_is_no_chain(config):
    assert chain_of(config) is None
