"""The shared tower, towers of their own layers, and the calibration of logits; TaskTowers are in test_fusion.py."""

import copy
import math

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference_checks import check, drawn_sizes, randomised, rows
from references.layers import Towers
from references.loops import Params, mlp
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from features.errors import UserError
from models.ranker import ModelConfig
from models.towers import Calibration, OwnTowers, SharedTower, TaskTowers, build_towers, widths_by_task

# Shapes: B rows, T tasks, D width, K numbers a task; of a calibration pieces of a line.
KNOTS = range(-7, 8)
sizes = drawn_sizes(kinds=st.lists(st.sampled_from(["binary", "regression"]), min_size=1, max_size=4))


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.lists(st.integers(1, 5), max_size=3), st.integers(1, 3))
def test_a_shared_tower_is_one_tower_a_task_with_the_same_parameters(size, widths, outputs):
    module = randomised(SharedTower(size.T, size.D, widths, outputs=outputs), size.seed)
    check(module, Towers(size.T, size.D, widths, shared=True, outputs=outputs), rows(size, size.T, size.D))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_but_for_the_biases_a_shared_tower_scores_tasks_in_any_order(size, data):
    order = data.draw(st.permutations(range(size.T)))
    module, h_BTD = randomised(SharedTower(size.T, size.D, [3]), size.seed), rows(size, size.T, size.D)
    module.bias_K1T.data.zero_()
    torch.testing.assert_close(module(h_BTD[:, order]), module(h_BTD)[:, :, order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [TaskTowers, SharedTower])
def test_towers_that_start_at_a_value_give_it_where_nothing_comes_in(kind):
    module, start_KT = kind(4, 3, [5], outputs=2), torch.randn(2, 4)
    module.start_at(start_KT)
    for name, parameter in module.named_parameters():
        if "hidden" in name:
            parameter.data.zero_()
    torch.testing.assert_close(module(torch.zeros(6, 4, 3)), start_KT.unsqueeze(1).expand(2, 6, 4))


@pytest.mark.parametrize("kind", [TaskTowers, SharedTower])
def test_under_autocast_the_last_layer_and_what_follows_round_no_logit_to_16_bits(kind):
    torch.manual_seed(0)
    module, calibration, h_BTD = kind(3, 16, [8]), Calibration(["binary"] * 3), torch.randn(200, 3, 16)
    module.start_at(torch.full((1, 3), -5.0))
    double = copy.deepcopy(module).double()
    tower, twin = (m.tower if kind is SharedTower else m for m in (module, double))
    hidden: list[Tensor] = []  # in bfloat16, whose rounding is meant to stay: of the hidden layers alone
    tower.hidden.register_forward_hook(lambda _, __, h_SBH: hidden.append(h_SBH))
    twin.hidden.register_forward_hook(lambda _, __, ___: hidden[-1].double())
    with torch.autocast("cpu", torch.bfloat16):
        logit_BT = calibration(module(h_BTD)[0])
    wanted_BT = Calibration(["binary"] * 3).double()(double(h_BTD.double())[0])
    assert hidden[0].dtype == torch.bfloat16
    assert logit_BT.dtype == torch.float32
    rounded_BT = wanted_BT.bfloat16().double()
    assert (logit_BT - wanted_BT).abs().max() < 1e-5 < 1e-2 < (rounded_BT - wanted_BT).abs().max()
    logit_BT.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def own_towers_twin(params: Params, widths: list[list[int]], sizes: list[int], h_BTD: Tensor) -> Tensor:
    """A network a task and row, and a linear layer above it; a number that a task does not have is 0."""
    out_KBT = []
    for k in range(max(sizes)):
        rows_BT = []
        for h_TD in h_BTD:
            out_T = []
            for t, size in enumerate(sizes):
                h_D = mlp(params, f"tasks.{t}.hidden.", 0, len(widths[t]), h_TD[t])
                weight_DH, bias_H = params[f"tasks.{t}.out.weight_SDH"][0], params[f"tasks.{t}.out.bias_SH"][0]
                out_T.append(h_D @ weight_DH[:, k] + bias_H[k] if k < size else torch.zeros(()).double())
            rows_BT.append(torch.stack(out_T))
        out_KBT.append(torch.stack(rows_BT))
    return torch.stack(out_KBT)


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_towers_of_their_own_layers_equal_their_reference(size, data):
    widths = data.draw(st.lists(st.lists(st.integers(1, 4), max_size=2), min_size=size.T, max_size=size.T))
    numbers = data.draw(st.lists(st.integers(1, 3), min_size=size.T, max_size=size.T))
    module = randomised(OwnTowers(size.D, widths, 0.0, numbers), size.seed)
    h_BTD = rows(size, size.T, size.D)
    check(module, lambda params, h_BTD: own_towers_twin(params, widths, numbers, h_BTD), h_BTD)


def test_towers_of_their_own_layers_start_at_a_value_where_nothing_comes_in():
    module, start_KT = OwnTowers(3, [[5], [], [4, 2]], 0.0, [2, 1, 2]), torch.randn(2, 3)
    module.start_at(start_KT)
    for name, parameter in module.named_parameters():
        if "hidden" in name:
            parameter.data.zero_()
    start_KT[1, 1] = 0
    torch.testing.assert_close(module(torch.zeros(6, 3, 3)), start_KT.unsqueeze(1).expand(2, 6, 3))


@pytest.mark.parametrize("tower", [[4], {"a": [4], "b": [4]}, [], {"b": [], "a": []}])
@pytest.mark.parametrize("shared", [False, True])
def test_towers_of_equal_layers_are_one_product_however_they_are_written(tower, shared):
    towers = build_towers(widths_by_task(tower, ["a", "b"]), 3, 0.0, [1, 2], shared)
    plain = (SharedTower if shared else TaskTowers)(2, 3, [4] if tower in ([4], {"a": [4], "b": [4]}) else [], 0.0, 2)
    assert type(towers) is type(plain)
    assert {n: p.shape for n, p in towers.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


def test_towers_by_task_follow_the_tasks_and_not_the_mapping():
    towers = build_towers(widths_by_task({"dwell": [], "click": [64, 32]}, ["click", "dwell"]), 8, 0.1, [1, 1])
    assert isinstance(towers, OwnTowers)
    assert [[layer.weight_SDH.shape[2] for layer in tower.hidden.layers] for tower in towers.tasks] == [[64, 32], []]
    assert towers(torch.randn(5, 2, 8)).shape == (1, 5, 2)
    # TorchRec's pipelined loop traces the model.
    assert torch.fx.symbolic_trace(towers.eval())(torch.ones(5, 2, 8)).equal(towers(torch.ones(5, 2, 8)))


@pytest.mark.parametrize(("tower", "shared", "message"), [
    ({"click": [8], "dwel": []}, False, r"model\.tower: dwel is not one of the tasks click, dwell"),
    ({"click": [8]}, False, r"model\.tower: has no layers for dwell; name each task, or give one list for all"),
    ({}, False, r"model\.tower: has no layers for click, dwell; "),
    ({"click": [8], "dwell": []}, True, r"model\.tower: this fusion has one tower for all tasks, give it one list"),
])  # fmt: skip
def test_towers_that_do_not_fit_the_tasks_are_refused_in_one_line(tower, shared, message):
    with pytest.raises(UserError, match=f"^{message}") as refused:
        build_towers(widths_by_task(tower, ["click", "dwell"]), 8, 0.0, [1, 1], shared)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("tower", "place"), [
    ([8, 0], (1,)), ([1 << 17], (0,)), ("8", ()), (None, ()), ([1] * 65, ()),
    ({"click": [8, 0]}, ("click", 1)), ({"click": 8}, ("click",)), ({"click": [1] * 65}, ("click",)),
])  # fmt: skip
def test_layers_of_towers_that_are_no_widths_are_refused_at_their_place(tower, place):
    with pytest.raises(ValidationError) as refused:
        ModelConfig.model_validate({"fusion": {"name": "mmoe"}, "tower": tower})
    assert [error["loc"] for error in refused.value.errors()] == [("tower", *place)]


@pytest.mark.parametrize("tower", [[8, 4], [], {"click": [8], "dwell": []}])
def test_layers_of_towers_are_written_as_they_are_read(tower):
    config = ModelConfig.model_validate({"fusion": {"name": "mmoe"}, "tower": tower})
    written = config.model_dump(mode="json", by_alias=True)
    assert ModelConfig.model_validate(written).tower == written["tower"] == tower


def slopes(params: Params, task: int) -> list[Tensor]:
    """log(1 + exp(a + log(e - 1))) of every piece: 1 at a = 0."""
    return [torch.log1p((math.e - 1) * torch.exp(a)) for a in params["steepness_TK"][task]]


def calibration_twin(params: Params, kinds: list[str], logit_BT: Tensor) -> Tensor:
    """From 0, where it is the shift, along the pieces to the logit."""
    outputs = []
    for logit_T in logit_BT:
        mapped = []
        for t, z in enumerate(logit_T):
            total, at = params["shift_T"][t], 0.0
            while kinds[t] == "binary" and at != z:
                piece = sum(at > knot if z < 0 else at >= knot for knot in KNOTS)
                ends = [-math.inf, *KNOTS, math.inf][piece : piece + 2]
                to = max(z, ends[0]) if z < 0 else min(z, ends[1])
                total, at = total + slopes(params, t)[piece] * (to - at), to
            mapped.append(total if kinds[t] == "binary" else z)
        outputs.append(torch.stack(mapped))
    return torch.stack(outputs)


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_calibration_equals_its_reference(size):
    module = randomised(Calibration(size.kinds), size.seed)
    check(module, lambda params, z_BT: calibration_twin(params, size.kinds, z_BT), 5 * rows(size, len(size.kinds)))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_between_the_outer_knots_calibration_is_numpys_interpolation(size):
    size.kinds = ["binary"] * len(size.kinds)
    module, z_B = randomised(Calibration(size.kinds), size.seed), np.linspace(KNOTS[0], KNOTS[-1], 101)
    found_BT = module(torch.tensor(z_B).unsqueeze(1).expand(-1, len(size.kinds))).detach().numpy()
    for t in range(len(size.kinds)):
        inner = [slope.item() for slope in slopes(dict(module.named_parameters()), t)[1:-1]]
        height_K = np.concatenate([[0.0], np.cumsum(inner)])
        height_K += module.shift_T[t].item() - height_K[KNOTS.index(0)]
        assert found_BT[:, t] == pytest.approx(np.interp(z_B, KNOTS, height_K), rel=1e-10, abs=1e-10)


def test_calibration_starts_as_the_identity():
    z_BT = torch.cat([torch.randn(500, 3) * 4, torch.tensor([[-1e4, 0.0, 1e4], [7.0, -7.0, 3.0]])])
    torch.testing.assert_close(Calibration(["binary"] * 3)(z_BT), z_BT, rtol=1e-6, atol=1e-6)


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.floats(0.1, 4))
def test_calibration_rises_strictly_whatever_is_learnt(size, scale):
    module = randomised(Calibration(["binary"]), size.seed)
    with torch.no_grad():
        module.steepness_TK *= scale
        rise_B = module(torch.linspace(-30, 30, 1001, dtype=torch.float64).unsqueeze(1)).diff(dim=0)
    assert (rise_B > 0).all()


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_regressions_pass_calibration_unchanged_and_teach_it_nothing(size):
    module, z_BT = randomised(Calibration(size.kinds), size.seed), 5 * rows(size, len(size.kinds))
    y_BT = module(z_BT)
    regression_T = torch.tensor([kind == "regression" for kind in size.kinds])
    assert torch.equal(y_BT[:, regression_T], z_BT[:, regression_T])
    y_BT.square().sum().backward()
    for parameter in module.parameters():
        assert not parameter.grad[regression_T].any()
        assert all(gradient.any() for gradient in parameter.grad[~regression_T])


def test_logits_in_bfloat16_are_calibrated_in_float32():
    module, z_BT = Calibration(["binary", "regression"]), torch.tensor([[1.5, -2.5], [-9.0, 0.25]])
    y_BT = module(z_BT.bfloat16())
    assert y_BT.dtype == torch.float32
    torch.testing.assert_close(y_BT, z_BT)


def entropy(logit_B: Tensor, label_B: Tensor) -> float:
    return F.binary_cross_entropy_with_logits(logit_B, label_B).item()


def test_calibration_mends_logits_that_are_too_steep_shifted_or_bent_and_leaves_the_auc_alone():
    rng = torch.Generator().manual_seed(0)
    true_BT = torch.randn(5000, 3, generator=rng, dtype=torch.float64) * 1.5 - 1
    label_BT = torch.bernoulli(true_BT.sigmoid(), generator=rng)
    bent_B = torch.where(true_BT[:, 2] > 0, 4 * true_BT[:, 2], true_BT[:, 2] / 2)
    wrong_BT = torch.stack([3 * true_BT[:, 0], true_BT[:, 1] / 2 + 2, bent_B], 1)
    module = Calibration(["binary"] * 3).double()
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        (mean := F.binary_cross_entropy_with_logits(module(wrong_BT), label_BT)).backward()
        return mean

    optimizer.step(loss)
    mended_BT = module(wrong_BT).detach()
    for t in range(3):
        best, before = entropy(true_BT[:, t], label_BT[:, t]), entropy(wrong_BT[:, t], label_BT[:, t])
        assert before > 1.05 * best
        assert entropy(mended_BT[:, t], label_BT[:, t]) < 1.002 * best
        assert roc_auc_score(label_BT[:, t], mended_BT[:, t]) == roc_auc_score(label_BT[:, t], wrong_BT[:, t])
