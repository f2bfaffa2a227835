"""What is derived from a search's strengths, and which architectures are none."""

import itertools
import math
from collections import Counter

import pytest
import torch
import yaml
from automtl_sizes import BLOCKS, INTERACTIONS, some
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference_checks import Sizes, drawn_sizes
from references import automtl as reference
from torch import Tensor

from features.errors import UserError
from models.automtl.architecture import Architecture, Budget, Space, Strengths, derive, random_strengths

# Shapes: T tasks, N experts, L blocks of an expert, O candidates of a block, I of the interaction.
SPACES = drawn_sizes(
    N=st.integers(1, 4), L=st.integers(1, 3), chosen=st.integers(1, 5), interaction=some(INTERACTIONS, 4),
    blocks=some(BLOCKS, 4),
)  # fmt: skip


def space(size: Sizes) -> Space:
    return Space(size.interaction, size.blocks, [f"t{t}" for t in range(size.T)], 8, 4, size.chosen)


def strengths(size: Sizes) -> Strengths:
    return random_strengths(space(size), size.N, size.L, size.seed)


def costs(size: Sizes) -> tuple[dict[str, float], dict[str, float]]:
    """Drawn, whole and some of them equal."""
    rng = torch.Generator().manual_seed(size.seed)
    found = [{name: float(torch.randint(0, 20, (), generator=rng)) for name in names}
             for names in (size.interaction, size.blocks)]  # fmt: skip
    return found[0], found[1]


def strongest(weight_O: Tensor) -> int:
    return max(range(len(weight_O)), key=lambda o: weight_O[o].item())


@settings(max_examples=examples(60), deadline=None)
@given(SPACES)
def test_the_strongest_candidate_of_each_block_and_the_strongest_experts_of_each_task_are_derived(size):
    given, known = strengths(size), space(size)
    found = derive(given, known)
    assert found.interaction == size.interaction[strongest(given.interaction_I)]
    assert found.experts == [[size.blocks[strongest(row)] for row in block] for block in given.expert_NLO]
    for t, task in enumerate(known.tasks):
        weight_N, count = given.task_TN[t].tolist(), min(size.chosen, size.N)
        best = max(itertools.combinations(range(size.N), count), key=lambda chosen: sum(weight_N[n] for n in chosen))
        assert found.tasks[task] == [n + 1 for n in best]
        assert found.strengths["tasks"][task] == {str(n + 1): round(weight_N[n], 4) for n in best}
    top = round(given.interaction_I.max().item(), 4)
    assert found.strengths["interaction"] == {found.interaction: top}
    assert found.strengths["experts"] == [[round(row.max().item(), 4) for row in block] for block in given.expert_NLO]
    assert (found.width, found.token_dim) == (8, 4)
    assert Architecture.model_validate(yaml.safe_load(yaml.safe_dump(found.model_dump()))).same(found)


@settings(max_examples=examples(80), deadline=None)
@given(SPACES, st.floats(0, 1.3))
def test_a_derived_network_is_within_its_budget_by_the_cheapest_replacements(size, share):
    given, known, (interaction, blocks) = strengths(size), space(size), costs(size)
    free = derive(given, known)
    used = [number - 1 for number in free.used]
    taken = interaction[free.interaction] + sum(blocks[name] for n in used for name in free.experts[n])
    flops = share * taken
    rows = [given.interaction_I, *given.expert_NLO[used].flatten(0, 1)]
    names = [size.interaction, *[size.blocks] * (len(rows) - 1)]
    prices = [[(interaction if b == 0 else blocks)[name] for name in row] for b, row in enumerate(names)]
    logs = [row.double().log().tolist() for row in rows]
    wanted = reference.within(flops, logs, prices, [strongest(row) for row in rows])
    budget = Budget(interaction, blocks, flops, chosen=2)
    if wanted is None:
        assert sum(min(row) for row in prices) > flops
        with pytest.raises(
            UserError, match=r"^search\.budget: even the cheapest candidates take more than .* Raise it"
        ):
            derive(given, known, budget)
        return
    found = derive(given, known, budget)
    own = [found.interaction, *(name for n in used for name in found.experts[n])]
    assert own == [row[o] for row, o in zip(names, wanted, strict=True)]
    assert sum(row[names[b].index(name)] for (b, row), name in zip(enumerate(prices), own, strict=True)) <= flops
    assert found.tasks == free.tasks
    others = set(range(size.N)) - set(used)
    assert [found.experts[n] for n in others] == [free.experts[n] for n in others], "these cost nothing"
    if share >= 1:
        assert found == free


def by_hand(flops: float) -> Architecture:
    """Two experts of one block. Log strengths lost and FLOPs saved, from the strongest:

    interaction: cross_1, log 4 = 1.386 for 10 - 2 = 8: 0.173 a FLOP.
    expert 1: mlp_4 to gating, log 1.5 = 0.405 for 20 - 15 = 5: 0.081; to skip, log 6 = 1.792 for 20: 0.090.
    expert 2: mlp_4 to gating, log 2 = 0.693 for 5: 0.139; to skip, log 4 = 1.386 for 20: 0.069.
    """
    given = Strengths(
        torch.tensor([0.8, 0.2]), torch.tensor([[[0.6, 0.4, 0.1]], [[0.4, 0.2, 0.1]]]), torch.tensor([[0.5, 0.5]])
    )
    known = Space(["cross_2", "cross_1"], ["mlp_4", "gating", "skip"], ["click"], 8, 4, 2)
    budget = Budget({"cross_2": 10, "cross_1": 2}, {"mlp_4": 20, "gating": 15, "skip": 0}, flops, chosen=2)
    return derive(given, known, budget)


@pytest.mark.parametrize(("flops", "interaction", "experts"), [
    (50, "cross_2", ["mlp_4", "mlp_4"]),  # all of them
    (49, "cross_2", ["mlp_4", "skip"]),  # 30: the second's block is the cheapest to give up
    (30, "cross_2", ["mlp_4", "skip"]),
    (29, "cross_2", ["gating", "skip"]),  # 25
    (24, "cross_2", ["skip", "skip"]),  # 10: gating to skip, log 4 for 15: 0.092, less than the interaction's 0.173
    (9, "cross_1", ["skip", "skip"]),  # 2
])  # fmt: skip
def test_replacements_of_a_small_case_are_those_found_by_hand(flops, interaction, experts):
    found = by_hand(flops)
    assert (found.interaction, found.experts) == (interaction, [[name] for name in experts])


def test_a_budget_that_nothing_is_within_is_said_in_one_line():
    with pytest.raises(UserError) as caught:
        by_hand(1.5)
    assert str(caught.value) == (
        "search.budget: even the cheapest candidates take more than 2 FLOPs a row. Raise it, or lower space.width, "
        "space.experts or space.blocks."
    )


def test_a_budget_allows_what_the_experts_in_use_take():
    tasks = {"a": [1, 3], "b": [3]}
    found = Architecture(
        width=8,
        token_dim=4,
        interaction="cross_1",
        experts=[["mlp_4", "skip"], ["mlp_4"] * 2, ["mlp_4"] * 2],
        tasks=tasks,
    )
    for flops, allowed in ((62, True), (61, False)):  # 2 + 3 * 20: the second expert is nobody's
        assert Budget({"cross_2": 10, "cross_1": 2}, {"mlp_4": 20, "skip": 0}, flops, chosen=2).allows(found) is allowed


def test_a_candidate_whose_strength_rounds_to_0_is_still_one():
    known = Space(["cross_2", "cross_1"], ["mlp_4", "skip"], ["click"], 8, 4, 1)
    given = Strengths(torch.tensor([1.0, 0.0]), torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1))
    budget = Budget({"cross_2": 10, "cross_1": 2}, {"mlp_4": 20, "skip": 0}, 2, chosen=2)
    found = derive(given, known, budget)
    assert (found.interaction, found.experts) == ("cross_1", [["skip"]])


def test_random_strengths_derive_every_architecture_equally_often():
    known, draws = Space(["cross_1", "skip"], ["mlp_4", "skip", "gating"], ["a"], 8, 4, 1), 3600
    found = Counter()
    for seed in range(draws):
        one = derive(random_strengths(known, 2, 1, seed), known)
        found[(one.interaction, *(row[0] for row in one.experts), *one.tasks["a"])] += 1
    cells = 2 * 3 * 3 * 2
    assert len(found) == cells
    squares = sum((count - draws / cells) ** 2 / (draws / cells) for count in found.values())
    assert squares < (cells - 1) + 4.5 * math.sqrt(2 * (cells - 1))  # of the chi-square distribution


def test_random_strengths_follow_from_their_seed_and_are_distributions():
    known = Space(INTERACTIONS, BLOCKS, ["a", "b"], 8, 4, 1)
    one, again, other = (random_strengths(known, 3, 2, seed) for seed in (1, 1, 2))
    for first, second, third in zip(one, again, other, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
        torch.testing.assert_close(first.sum(-1), torch.ones(first.shape[:-1]))
    assert one.expert_NLO.shape == (3, 2, len(BLOCKS))
    assert one.task_TN.shape == (2, 3)


CONTENT = {
    "width": 8, "token_dim": 4, "interaction": "cross_2",
    "experts": [["mlp_4", "skip"], ["skip", "skip"], ["gating", "conv_3"]], "tasks": {"click": [1, 2], "buy": [1]},
}  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), [
    ({"interaction": "dot"}, "interaction: dot is not one of product, cross, attention, mlp, skip"),
    ({"interaction": "cross"}, "interaction: cross: it needs a size"),
    ({"experts": [["mlp_4"], ["dense"]]}, "experts, the one of number 2: dense is not one of gating, mlp, conv, skip"),
    ({"experts": [["conv_2"]]}, "experts, the one of number 1: conv_2: a kernel needs an odd size"),
    ({"experts": [["mlp_4"], ["skip", "skip"]]}, "experts: have unlike numbers of blocks; add skip where one has fewer"),
    ({"experts": []}, "experts"), ({"experts": [[]]}, "experts"),
    ({"tasks": {"click": [1], "buy": [4]}}, "tasks.buy: [4] are not different numbers from 1 to 3"),
    ({"tasks": {"buy": [0, 1]}}, "tasks.buy: [0, 1] are not different numbers from 1 to 3"),
    ({"tasks": {"buy": [2, 1, 2]}}, "tasks.buy: [2, 1, 2] are not different"), ({"tasks": {"buy": []}}, "tasks.buy: []"),
    ({"tasks": {}}, "tasks"), ({"width": 0}, "width"), ({"token_dim": 1 << 17}, "token_dim"), ({"depth": 2}, "depth"),
])  # fmt: skip
def test_what_is_no_architecture_is_said_with_its_place(changes, says):
    with pytest.raises(ValidationError) as caught:
        Architecture.model_validate(CONTENT | changes)
    [error] = caught.value.errors()
    assert says in ".".join(map(str, error["loc"])) + error["msg"]


@pytest.mark.parametrize("part", ["width", "token_dim", "interaction", "experts", "tasks"])
def test_an_architecture_without_one_of_its_parts_is_refused(part):
    with pytest.raises(ValidationError, match=part):
        Architecture.model_validate({key: value for key, value in CONTENT.items() if key != part})


def test_the_summary_names_what_is_used_and_skips_only_where_nothing_else_is_there():
    found = Architecture.model_validate(CONTENT)
    assert found.used == [1, 2]
    assert found.summary() == "cross_2 | 1 mlp_4 | 2 skip | click 1 2 | buy 1"


@pytest.mark.parametrize("changes", [
    {"width": 9}, {"token_dim": 8}, {"interaction": "cross_3"}, {"experts": [["mlp_4", "skip"]] * 3},
    {"tasks": {"click": [1, 2]}},
])  # fmt: skip
def test_architectures_are_the_same_whatever_their_strengths(changes):
    one = Architecture.model_validate(CONTENT)
    assert one.same(Architecture.model_validate(CONTENT | {"strengths": {"interaction": {"cross_2": 0.4}}}))
    assert not one.same(Architecture.model_validate(CONTENT | changes))
    assert not one.same(None)


def test_no_more_experts_are_chosen_than_there_are():
    size = Sizes(T=2, N=2, L=1, chosen=9, seed=1, interaction=["skip"], blocks=["skip"])
    assert derive(strengths(size), space(size)).tasks == {"t0": [1, 2], "t1": [1, 2]}
