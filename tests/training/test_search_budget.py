"""What a found architecture may cost, counted on the network that is built from it; and random search."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_search import SPACE, prepared, run_search, searching
from tiny_training import configuration
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from features.errors import UserError
from models.automtl.architecture import Architecture
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.search.search import search

TASKS = ("click", "conversion", "dwell")


def flops_of(folder: Path, fusion: dict[str, Any]) -> float:
    """Of a row, in float64, where every product is one that torch counts itself."""
    data = Dataset(folder / "data")
    model = ModelConfig(fusion=fusion, tower=[8])
    ranker = Ranker(data.schema, data.encoders, model, device="cpu").double().eval()
    loader = Loader(data, "test", 16, 2)
    batch = next(iter(loader.batches(loader.start())))
    batch = type(batch)(**(vars(batch) | {"dense_BD": batch.dense_BD.double()}))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ranker(batch)
    return counter.get_total_flops() / 16


def network(interaction: str = "skip", block: str = "skip", **change: Any) -> dict[str, Any]:
    """A fusion: the first block of the first expert may be another operation than skip; every task has all experts."""
    blocks = [[block, "skip"], ["skip", "skip"], ["skip", "skip"]]
    found = {
        "width": 8, "token_dim": 4, "interaction": interaction, "experts": blocks,
        "tasks": {task: [1, 2, 3] for task in TASKS},
    }  # fmt: skip
    return {"name": "automtl", "architecture": found | change}


def found_in(run: Path) -> dict[str, Any]:
    content = yaml.safe_load((run / "architecture.yaml").read_text())
    return {"name": "automtl", "architecture": {key: value for key, value in content.items() if key != "strengths"}}


def by_hand(value: Tensor, cost: list[float], sharpness: float) -> Tensor:
    """The gradient of the expected cost by alpha: s p_o (c_o - sum of p c), where p = softmax(s alpha)."""
    p, cost_O = (sharpness * value.double()).softmax(-1), torch.tensor(cost, dtype=torch.float64)
    return sharpness * p * (cost_O - (p * cost_O).sum(-1, keepdim=True))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("homogeneous", [False, True])
def test_the_budgets_gradient_is_that_of_the_expected_flops_of_the_experts_in_use(
    folder: Path, homogeneous: bool
) -> None:
    """A constant that all candidates of a block share changes nothing, so their costs are differences to skip."""
    limit, weight, grads, start = 2000.0, 3.0, {}, {}
    for name, budget in (("free", None), ("bound", {"flops": limit, "weight": weight})):
        run = folder / f"gradient-{name}-{homogeneous}"
        settings = {"budget": budget, "evaluate_every": 100, "sharpness": 4}
        made = prepared(
            searching(folder / "data", run, {"chosen": 1, "homogeneous": homogeneous}, settings, max_steps=2)
        )
        net = made.learner.supernet
        net.beta_TN.data[:] = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 0.5], [0.0, -1.0, 3.0]])
        start = {"alpha_I": net.alpha_I.detach().clone(), "alpha_NLO": net.alpha_NLO.detach().clone()}
        if budget:
            left = made.learner.budget.flops
        made.learner.valid = made._valid_batches()
        # The second step of two: sharpness has come to its square root.
        made.learner.forward(next(iter(made.loader.batches(made.loader.start()))), 1)
        grads[name] = {key: net.get_parameter(key).grad.double() for key in start}
    every = flops_of(folder, network())
    in_dim = made.learner.ranker.numbers.out_dim
    assert left == pytest.approx(limit - (every - 2 * in_dim * 8))  # towers and gates, without the interaction
    interaction = [flops_of(folder, network(interaction=name)) - every for name in SPACE["interaction"]]
    blocks = [flops_of(folder, network(block=name)) - every for name in SPACE["blocks"]]
    assert sorted(blocks)[0] == 0
    wanted_I = weight / left * by_hand(start["alpha_I"], interaction, 2)
    wanted_NLO = weight / left * by_hand(start["alpha_NLO"], blocks, 2)
    if homogeneous:
        wanted_NLO *= 2  # of two experts in use
    else:
        wanted_NLO[1] = 0  # no task has it
    added = {key: grads["bound"][key] - grads["free"][key] for key in start}
    torch.testing.assert_close(added["alpha_I"], wanted_I, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(added["alpha_NLO"], wanted_NLO, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("device")
def test_a_budget_that_is_kept_adds_nothing(folder: Path) -> None:
    for name, budget in (("unbound", None), ("wide", {"flops": 1e6})):
        run_search(folder, name, search={"budget": budget}, max_steps=3)
    assert found_in(folder / "unbound") == found_in(folder / "wide")
    texts = [(folder / name / "metrics" / "search.jsonl").read_text() for name in ("unbound", "wide")]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_a_found_network_is_within_its_budget_as_built(folder: Path, share: float) -> None:
    """Between the cheapest and the dearest network of the space."""
    low = flops_of(folder, network())
    dearest = {"interaction": "attention_2", "experts": [["mlp_8", "mlp_8"]] * 3}
    high = flops_of(folder, network(**dearest))
    limit = low + share * (high - low)
    run_search(folder, f"within-{share}", search={"budget": {"flops": limit}}, max_steps=2)
    assert flops_of(folder, found_in(folder / f"within-{share}")) <= limit


@pytest.mark.usefixtures("device")
def test_a_budget_may_be_a_share_of_another_models_flops(folder: Path) -> None:
    mmoe = configuration(folder / "data", folder).model
    whole = flops_of(folder, mmoe.fusion)
    made = run_search(
        folder, "half", search={"budget": {"flops": 0.5, "model": mmoe.model_dump(by_alias=True)}}, max_steps=2
    )
    assert flops_of(folder, found_in(folder / "half")) <= 0.5 * whole
    bound = prepared(searching(folder / "data", folder / "never", search={"budget": {"flops": 0.5 * whole}}))
    assert made.learner.budget == bound.learner.budget


@pytest.mark.usefixtures("device")
def test_a_budget_that_nothing_meets_is_refused_with_what_to_do(folder: Path) -> None:
    with pytest.raises(UserError, match=r"search\.budget: 1 FLOPs a row, of which .* take [\d,]+\. Raise flops, or"):
        run_search(folder, "nothing-left", search={"budget": {"flops": 1}})
    assert not (folder / "nothing-left").exists()
    limit = flops_of(folder, network()) + 10  # all skip, of which the space has none
    with pytest.raises(UserError, match=r"search\.budget: even the cheapest candidates take more than"):
        run_search(folder, "too-dear", space={"blocks": ["mlp_8", "gating"]}, search={"budget": {"flops": limit}})


# Random search


def random_config(folder: Path, name: str, seed: int = 0, space: dict[str, Any] | None = None, **search: Any) -> Any:
    return searching(folder / "data", folder / name, space, {"method": "random"} | search, seed=seed)


def test_random_search_draws_every_choice_evenly(folder: Path) -> None:
    counts: Counter[Any] = Counter()
    draws = 200
    for seed in range(draws):
        found = search(random_config(folder, "drawn", seed))
        counts["interaction", found.interaction] += 1
        for expert in found.experts:
            for level, name in enumerate(expert):
                counts[level, name] += 1
        counts["pair", tuple(found.tasks["click"])] += 1
    for part, names, total in (
        ("interaction", SPACE["interaction"], draws), (0, SPACE["blocks"], 3 * draws), (1, SPACE["blocks"], 3 * draws),
        ("pair", [(1, 2), (1, 3), (2, 3)], draws),
    ):  # fmt: skip
        even = total / len(names)
        chi2 = sum((counts[part, name] - even) ** 2 / even for name in names)
        assert chi2 < 20, (part, counts)  # one in a thousand for four degrees of freedom is 18.5


def test_random_search_writes_one_file_which_the_seed_decides(folder: Path) -> None:
    one, again = (search(random_config(folder, name, 7)) for name in ("drawn-7", "drawn-again"))
    assert [path.name for path in (folder / "drawn-7").iterdir()] == ["architecture.yaml"]
    assert one.same(again)
    assert one.same(Architecture.model_validate(yaml.safe_load((folder / "drawn-7" / "architecture.yaml").read_text())))
    assert not one.same(search(random_config(folder, "drawn-8", 8)))
    assert "drawn at random, seed 7" in (folder / "drawn-7" / "architecture.yaml").read_text()


def test_random_search_draws_from_the_space_of_homogeneous_experts_and_of_gates(folder: Path) -> None:
    found = [search(random_config(folder, "alike", seed, {"homogeneous": True})) for seed in range(5)]
    assert all(architecture.experts.count(architecture.experts[0]) == 3 for architecture in found)
    gates = search(random_config(folder, "gated", 0, {"selection": "gates"}))
    assert set(map(tuple, gates.tasks.values())) == {(1, 2, 3)}


def test_random_search_draws_anew_until_a_network_is_within_the_budget_as_built(folder: Path) -> None:
    free = {seed: search(random_config(folder, f"free-{seed}", seed)) for seed in range(12)}
    cost = {seed: flops_of(folder, found_in(folder / f"free-{seed}")) for seed in free}
    limit = sorted(cost.values())[5]
    for seed, first in free.items():
        found = search(random_config(folder, f"bound-{seed}", seed, budget={"flops": limit}))
        assert flops_of(folder, found_in(folder / f"bound-{seed}")) <= limit
        # Gates of experts that nobody has are counted too, so that a network at the limit may be drawn anew.
        assert found.same(first) or cost[seed] > 0.9 * limit
    assert sum(found_in(folder / f"bound-{seed}") == found_in(folder / f"free-{seed}") for seed in free) >= 3


def test_random_search_within_a_budget_that_no_draw_meets_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.search.search.MOST_TRIES", 20)
    limit = flops_of(folder, network()) + 10
    config = random_config(folder, "poor", 0, {"blocks": ["mlp_8", "gating"]}, budget={"flops": limit})
    with pytest.raises(UserError, match=r"search\.budget: none of 20 architectures drawn is within it\. Raise it, or"):
        search(config)
    assert not (folder / "poor").exists()
