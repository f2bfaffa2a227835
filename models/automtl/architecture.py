"""An architecture of AutoMTL: what a search found, what the model that is trained from scratch is built from."""

# Shapes: N experts, L blocks of an expert, O candidates, I candidates of the interaction, T tasks.

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from features.errors import UserError
from models.automtl.blocks import check_names
from models.automtl.interactions import INTERACTIONS
from models.automtl.operations import OPERATIONS

Names = Annotated[list[str], Field(min_length=1, max_length=1000)]
Size = Annotated[int, Field(ge=1, le=1 << 16)]


class Architecture(BaseModel):
    """architecture.yaml.

    Attributes:
        width: H, of every block's output. token_dim: W, where the interaction reads a token of each feature.
        interaction: an operation of models.automtl.interactions.
        experts: of each, in order, the operations of its blocks (models.automtl.operations), all equally many.
        tasks: of each the experts that its gate mixes, numbered from 1.
        strengths: of what was chosen, for the reader; nothing is built from them.
    """

    model_config = ConfigDict(extra="forbid")
    width: Size
    token_dim: Size
    interaction: str
    experts: Annotated[list[Names], Field(min_length=1, max_length=1000)]
    tasks: Annotated[dict[str, list[int]], Field(min_length=1)]
    strengths: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Architecture":
        """Pydantic makes its own errors of ValueErrors alone."""
        try:
            check_names([self.interaction], INTERACTIONS, "interaction")
            for number, names in enumerate(self.experts, 1):
                check_names(names, OPERATIONS, f"experts, the one of number {number}")
        except UserError as error:
            raise ValueError(str(error)) from None
        if len({len(names) for names in self.experts}) > 1:
            raise ValueError("experts: have unlike numbers of blocks; add skip where one has fewer")
        for task, numbers in self.tasks.items():
            if not numbers or not {*numbers} <= {*range(1, len(self.experts) + 1)} or len({*numbers}) < len(numbers):
                raise ValueError(f"tasks.{task}: {numbers} are not different numbers from 1 to {len(self.experts)}")
        return self

    @property
    def used(self) -> list[int]:
        """Numbers of the experts that some task has."""
        return sorted({number for numbers in self.tasks.values() for number in numbers})

    def same(self, other: "Architecture | None") -> bool:
        """Whether both are the same network, whatever their strengths."""
        return other is not None and self.model_dump(exclude={"strengths"}) == other.model_dump(exclude={"strengths"})

    def summary(self) -> str:
        """One line: cross_2 | 1 mlp_64 conv_3 | 2 gating | click 1 2."""
        experts = []
        for number in self.used:
            blocks = [name for name in self.experts[number - 1] if name != "skip"] or ["skip"]
            experts.append(f"{number} {' '.join(blocks)}")
        tasks = [f"{task} {' '.join(map(str, numbers))}" for task, numbers in self.tasks.items()]
        return " | ".join([self.interaction, *experts, *tasks])


class Strengths(NamedTuple):
    """Softmax over the candidates: of the interaction, of each expert's blocks, and over experts of each task."""

    interaction_I: Tensor
    expert_NLO: Tensor
    task_TN: Tensor


class Space(NamedTuple):
    """What strengths are of: names of candidates and tasks, and what an architecture has beside its choices."""

    interaction: Sequence[str]
    blocks: Sequence[str]
    tasks: Sequence[str]
    width: int
    token_dim: int
    chosen: int


class Budget(NamedTuple):
    """FLOPs of a row's forward pass: of every candidate by name, and the most that interaction and blocks may have.

    Attributes:
        chosen: experts of each task.
    """

    interaction: Mapping[str, float]
    blocks: Mapping[str, float]
    flops: float
    chosen: int

    def allows(self, found: Architecture) -> bool:
        """Whether an architecture is within it."""
        blocks = (self.blocks[name] for number in found.used for name in found.experts[number - 1])
        return self.interaction[found.interaction] + sum(blocks) <= self.flops


def derive(strengths: Strengths, space: Space, budget: Budget | None = None) -> Architecture:
    """The strongest candidate of each block and the `chosen` strongest experts of each task (Algorithm 1, lines 10 and 11).

    Under a budget candidates are replaced one by one, each time the one that gives up the least log strength per FLOP saved,
    until the network is within it.

    Raises:
        UserError: not even the cheapest candidates are within the budget.
    """
    selected_TC = strengths.task_TN.topk(min(space.chosen, strengths.task_TN.shape[1])).indices.sort().values
    tasks = {task: [n + 1 for n in row] for task, row in zip(space.tasks, selected_TC.tolist(), strict=True)}
    used = sorted({number - 1 for numbers in tasks.values() for number in numbers})
    interaction = int(strengths.interaction_I.argmax())
    choice_NL = strengths.expert_NLO.argmax(2)
    if budget is not None:
        interaction, choice_NL = _within(budget, strengths, space, used, interaction, choice_NL)
    found = {
        "interaction": {space.interaction[interaction]: _rounded(strengths.interaction_I[interaction])},
        "experts": [
            [_rounded(strengths.expert_NLO[n, level, o]) for level, o in enumerate(row)]
            for n, row in enumerate(choice_NL.tolist())
        ],
        "tasks": {
            task: {str(number): _rounded(strengths.task_TN[t, number - 1]) for number in tasks[task]}
            for t, task in enumerate(space.tasks)
        },
    }
    return Architecture(
        width=space.width, token_dim=space.token_dim, interaction=space.interaction[interaction],
        experts=[[space.blocks[o] for o in row] for row in choice_NL.tolist()], tasks=tasks, strengths=found,
    )  # fmt: skip


def _rounded(strength: Tensor) -> float:
    return round(float(strength), 4)


def _within(
    budget: Budget, strengths: Strengths, space: Space, used: Sequence[int], interaction: int, choice_NL: Tensor
) -> tuple[int, Tensor]:
    """The choices after as many replacements as the budget needs."""
    choice_NL = choice_NL.clone()
    cost_I = torch.tensor([budget.interaction[name] for name in space.interaction], dtype=torch.float64)
    cost_O = torch.tensor([budget.blocks[name] for name in space.blocks], dtype=torch.float64)
    log_I, log_NLO = _log(strengths.interaction_I), _log(strengths.expert_NLO)[used]
    while cost_I[interaction] + cost_O[choice_NL[used]].sum() > budget.flops:
        price_I = _price(log_I, cost_I, torch.tensor(interaction))
        price_NLO = _price(log_NLO, cost_O, choice_NL[used])
        if min(price_I.min(), price_NLO.min()) == torch.inf:
            raise UserError(
                f"search.budget: even the cheapest candidates take more than {budget.flops:,.0f} FLOPs a row. Raise it, or "
                "lower space.width, space.experts or space.blocks."
            )
        if price_I.min() <= price_NLO.min():
            interaction = int(price_I.argmin())
        else:
            n, level, o = (int(place) for place in torch.unravel_index(price_NLO.argmin(), price_NLO.shape))
            choice_NL[used[n], level] = o
    return interaction, choice_NL


def _log(strength: Tensor) -> Tensor:
    """Finite where a strength rounds to 0: such a candidate is the last one to be taken, but it may be."""
    return strength.double().clamp(min=torch.finfo(torch.float64).tiny).log()


def _price(log: Tensor, cost_O: Tensor, choice: Tensor) -> Tensor:
    """Log strength lost for a FLOP saved by each candidate in place of the chosen one; infinite where none is saved."""
    saved = cost_O[choice].unsqueeze(-1) - cost_O
    lost = log.gather(-1, choice.unsqueeze(-1)) - log
    return torch.where(saved > 0, lost / saved, torch.inf)


def random_strengths(space: Space, experts: int, depth: int, seed: int) -> Strengths:
    """Strengths whose derived architecture is drawn uniformly: of random search, which a search is compared with."""
    rng = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng).softmax(-1)

    return Strengths(
        drawn(len(space.interaction)), drawn(experts, depth, len(space.blocks)), drawn(len(space.tasks), experts)
    )
