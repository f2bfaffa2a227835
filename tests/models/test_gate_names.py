"""Names of units and experts of every fusion's gates: as many as there are weights, by owner, in the weights' order."""

# Shapes: B rows, T tasks, F features, U units, E experts.

from typing import Any

import pytest
import torch
from reference_checks import randomised
from small_architecture import small_architecture, small_supernet

from models.fusion import FUSIONS, build_fusion
from models.fusion.decomposition import TrainedModel
from models.fusion.emm import EMM
from models.fusion.fusion import Fusion

TASKS, FEATURES, WIDTH, ROWS = ["click", "order", "dwell"], ["user", "item", "hour", "price"], 4, 5
TWO = [[4], [4]]
SETTINGS: dict[str, dict[str, Any]] = {
    "single_task": {"widths": [4]},
    "shared_bottom": {"widths": [4]},
    "cross_stitch": {"levels": TWO},
    "mmoe": {"num_experts": 2, "levels": [[4]]},
    "ml_mmoe": {"num_experts": 2, "levels": TWO},
    "cgc": {"levels": [[4]], "task_experts": 2, "shared_experts": 2},
    "ple": {"levels": TWO, "task_experts": [2, 1, 1], "shared_experts": [1, 2]},
    "adatt": {"levels": TWO, "task_experts": [1, 2, 1], "shared_experts": [2, 0]},
    "aitm": {"widths": [4]},
    "apem": {"widths": [4]},
    "dtrn": {"widths": [4]},
    "multitab": {},
    "autotask": {"width": 4},
    "home": {"levels": TWO, "groups": [["order"], ["click", "dwell"]]},
    "pepnet": {"widths": [4, 4]},
    "stem": {"widths": [4], "task_experts": 2, "shared_experts": 3},
    "automtl": {"architecture": small_architecture(TASKS)},
    "automtl_supernet": small_supernet(),
}


def built(name: str) -> tuple[Fusion, torch.Tensor]:
    """A fusion of random weights in evaluation, and an input for it."""
    kind = FUSIONS[name]
    columns = [[f] for f in range(WIDTH)]
    fusion = build_fusion({"name": name, **SETTINGS[name]}, WIDTH, TASKS, FEATURES, columns=columns)
    shape = (ROWS, len(FEATURES), WIDTH) if kind.fields else (ROWS, WIDTH)
    if (sets := kind.table_sets(len(TASKS))) > 1:
        shape = (ROWS, sets, WIDTH)
    return randomised(fusion, 0).eval(), torch.randn(shape, dtype=torch.float64)


def mean_weights(name: str) -> list[dict[str, dict[str, float]]]:
    """By level, unit and expert, the mean weight over the rows."""
    fusion, x = built(name)
    levels = zip(fusion.gate_names(TASKS, FEATURES), fusion.gates(x), strict=True)
    return [
        {
            unit: dict(zip(names.experts, row, strict=True))
            for unit, row in zip(names.units, w.mean(0).tolist(), strict=True)
        }
        for names, w in levels
    ]


def test_every_fusion_is_among_those_tested() -> None:
    assert SETTINGS.keys() == FUSIONS.keys() - {"emm"}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_unit_and_expert_with_a_weight_has_a_name_of_its_own(name: str) -> None:
    fusion, x = built(name)
    weights, names = fusion.gates(x), fusion.gate_names(TASKS, FEATURES)
    assert [(len(n.units), len(n.experts)) for n in names] == [tuple(w.shape[1:]) for w in weights]
    for level in names:
        assert len(set(level.units)) == len(level.units)
        assert len(set(level.experts)) == len(level.experts)
    if names:
        assert set(TASKS) <= set(names[-1].units)


@pytest.mark.parametrize("name", ["ple", "cgc"])
def test_a_task_of_ple_only_weighs_experts_of_its_own_name_and_shared_ones(name: str) -> None:
    for level in mean_weights(name):
        for unit, weights in level.items():
            seen = {expert.split(" ")[0] for expert, weight in weights.items() if weight > 0}
            assert seen == (set(TASKS) | {"shared"} if unit == "shared" else {unit, "shared"})


def test_experts_of_unequal_numbers_are_numbered_by_owner() -> None:
    fusion, _ = built("ple")
    first, last = fusion.gate_names(TASKS, FEATURES)
    assert first.units == [*TASKS, "shared"]
    assert first.experts == ["click 1", "click 2", "order", "dwell", "shared"]
    assert last.units == TASKS
    assert last.experts == ["click 1", "click 2", "order", "dwell", "shared 1", "shared 2"]


def test_adatt_adds_the_native_weight_to_the_experts_of_the_named_task() -> None:
    fusion, x = built("adatt")
    level = fusion.get_submodule("levels.0")
    gate_UBE = level.gate(x.unsqueeze(0)).softmax(-1)
    added_UE = fusion.gates(x)[0].mean(0) - gate_UBE.mean(1)
    names = fusion.gate_names(TASKS, FEATURES)[0]
    for unit, added_E in zip(names.units, added_UE, strict=True):
        own = {name for name, value in zip(names.experts, added_E.tolist(), strict=True) if abs(value) > 1e-9}
        assert own == {name for name in names.experts if name.split(" ")[0] == unit}


def test_units_of_lower_levels_of_mmoe_are_the_experts_above() -> None:
    fusion, _ = built("ml_mmoe")
    first, last = fusion.gate_names(TASKS, FEATURES)
    assert first.units == ["shared 1, level 2", "shared 2, level 2"]
    assert first.experts == last.experts == ["shared 1", "shared 2"]
    assert last.units == TASKS


def test_tasks_of_home_only_weigh_experts_of_their_group() -> None:
    of_groups, of_tasks = mean_weights("home")
    seen = {unit: {name for name, weight in row.items() if weight > 0} for unit, row in of_groups.items()}
    assert seen["click"] == seen["dwell"] == {"group click+dwell 1", "group click+dwell 2", "shared 1", "shared 2"}
    assert seen["order"] == {"group order 1", "group order 2", "shared 1", "shared 2"}
    assert len(seen["shared"]) == 6
    assert {name for name, weight in of_tasks["dwell"].items() if weight > 0} == {
        "dwell 1", "dwell 2", "group click+dwell 1", "group click+dwell 2", "shared 1", "shared 2"
    }  # fmt: skip


def test_a_task_of_stem_trains_only_the_experts_of_its_own_name_and_shared_ones() -> None:
    fusion, x = built("stem")
    [names] = fusion.gate_names(TASKS, FEATURES)
    fusion(x)[:, 1].sum().backward()
    gradient_E = fusion.get_parameter("experts.layers.0.weight_SDH").grad.abs().sum((1, 2))
    trained = {name for name, value in zip(names.experts, gradient_E.tolist(), strict=True) if value > 0}
    assert trained == {"order 1", "order 2", "shared 1", "shared 2", "shared 3"}


def test_tasks_of_automtl_only_weigh_the_experts_that_were_chosen_by_their_numbers() -> None:
    experts = [["mlp_4"], ["skip"], ["gating"], ["conv_3"]]
    chosen = small_architecture(TASKS) | {"experts": experts, "tasks": {"click": [4, 1], "order": [4], "dwell": [3]}}
    fusion = build_fusion(
        {"name": "automtl", "architecture": chosen}, WIDTH, TASKS, FEATURES, columns=[[0], [1], [2], [3]]
    )
    [names], [gate_BTN] = fusion.gate_names(TASKS, FEATURES), fusion.gates(torch.randn(ROWS, WIDTH))
    assert names.experts == ["expert 1", "expert 3", "expert 4"]
    seen = [[name for name, own in zip(names.experts, row, strict=True) if own] for row in (gate_BTN > 0).all(0)]
    assert seen == [["expert 1", "expert 4"], ["expert 4"], ["expert 3"]]
    assert (gate_BTN > 0).sum() == ROWS * 4


def test_experts_of_a_fused_model_are_the_trained_models() -> None:
    models = [TrainedModel(f"runs/{n}", task, WIDTH, [8, 4]) for n, task in (("a", 0), ("b", 1), ("c", 1))]
    fusion = randomised(EMM(3 * WIDTH, 2, models, merge=False), 0).eval()
    [first, _] = fusion.gates(torch.randn(ROWS, 3 * WIDTH, dtype=torch.float64))
    names = fusion.gate_names(["click", "order"], FEATURES)
    assert len(names) == 2
    for unit, weight_E in zip(names[0].units, first.mean(0), strict=True):
        used = {name for name, weight in zip(names[0].experts, weight_E.tolist(), strict=True) if weight > 0}
        assert used == {"click": {"runs/a"}, "order": {"runs/b", "runs/c"}}[unit]
