"""Choice blocks: all candidate operations at once, mixed by weights (AutoMTL, section 3.4.1), or those that were chosen."""

# Shapes: S experts, B rows, D width in, F features, W width of a token, H width out, O candidates.

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from features.errors import UserError
from models.automtl.interactions import INTERACTIONS, Fields, Interaction
from models.automtl.operations import MLP, OPERATIONS, Operation, of
from models.inputs import Tokens


class ExpertBlock(nn.Module):
    """One block of S experts, each of which mixes the candidates by weights of its own.

    Args:
        candidates: names of operations, such as mlp_64. stack: S. width: H. nested: see MLP.
    """

    def __init__(self, candidates: Sequence[str], stack: int, width: int, nested: bool = True) -> None:
        super().__init__()
        self.stack, self.kinds = stack, nn.ModuleDict()
        self.places: dict[str, list[int]] = {}
        for kind, sizes in sizes_by_kind(candidates, OPERATIONS).items():
            options: dict[str, Any] = {"nested": nested} if OPERATIONS[kind] is MLP else {}
            self.kinds[kind] = OPERATIONS[kind](stack, width, sizes, **options)
            self.places[kind] = [o for o, name in enumerate(candidates) if kind_of(name) == kind]

    def forward(self, x_SBH: Tensor, weight_SO: Tensor) -> Tensor:
        """y_SBH, the mixture of all candidates. x_1BH is the input of all experts."""
        parts = [
            operation.mixture(x_SBH, weight_SO[:, self.places[kind]])
            for kind, operation in self.kinds.items()
            if isinstance(operation, Operation)
        ]
        return torch.stack(parts).sum(0)

    def path(self, x_SBH: Tensor, weight_SO: Tensor, choice_S: Sequence[int]) -> Tensor:
        """y_SBH of one candidate an expert, by its index, times its weight; the others are not computed."""
        found: list[Tensor] = []
        order: list[int] = []
        for kind, operation in self.kinds.items():
            assert isinstance(operation, Operation)
            for size, place in enumerate(self.places[kind]):
                if experts := [s for s, choice in enumerate(choice_S) if choice == place]:
                    y_SBH = operation.one(x_SBH if len(x_SBH) < self.stack else of(x_SBH, experts), size, experts)
                    found.append(y_SBH * weight_SO[experts, place, None, None])
                    order += experts
        inverse_S = torch.tensor(order, device=x_SBH.device).argsort()
        return torch.cat(found).index_select(0, inverse_S)


class ChosenBlock(nn.Module):
    """One block of S experts, each of one operation; experts with the same operation are one stack.

    Args:
        names: of the operation of each expert. width: H. shared_input: all experts read x_1BH.
    Shapes: x_SBH, or x_1BH -> y_SBH.
    """

    inverse_S: Tensor

    def __init__(self, names: Sequence[str], width: int, shared_input: bool) -> None:
        super().__init__()
        self.shared_input, self.operations = shared_input, nn.ModuleDict()
        self.experts: dict[str, list[int]] = {}
        for name in dict.fromkeys(names):
            kind, size = split_name(name)
            self.experts[name] = [s for s, other in enumerate(names) if other == name]
            self.operations[name] = OPERATIONS[kind](len(self.experts[name]), width, [size])
        order = [s for experts in self.experts.values() for s in experts]
        self.register_buffer("inverse_S", torch.tensor(order, device="cpu").argsort(), persistent=False)

    def forward(self, x_SBH: Tensor) -> Tensor:
        if len(self.operations) == 1:
            (operation,) = self.operations.values()
            assert isinstance(operation, Operation)
            return operation.one(x_SBH, 0)
        parts = []
        for name, operation in self.operations.items():
            assert isinstance(operation, Operation)
            parts.append(operation.one(x_SBH if self.shared_input else of(x_SBH, self.experts[name]), 0))
        return torch.cat(parts).index_select(0, self.inverse_S)


class InteractionBlock(nn.Module):
    """The feature-interaction block: all candidates mixed, or the only one.

    Args:
        candidates: names of interactions, such as cross_2. columns: of each feature in x_BD. in_dim: D. token_dim: W.
        width: H. nested: see MLP.
    """

    def __init__(
        self, candidates: Sequence[str], columns: Sequence[Sequence[int]], in_dim: int, token_dim: int, width: int,
        nested: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        fields = Fields(in_dim, len(columns), token_dim)
        self.kinds = nn.ModuleDict()
        self.places: dict[str, list[int]] = {}
        for kind, sizes in sizes_by_kind(candidates, INTERACTIONS).items():
            options: dict[str, Any] = {"nested": nested} if kind == "mlp" else {}
            self.kinds[kind] = INTERACTIONS[kind](fields, width, sizes, **options)
            self.places[kind] = [o for o, name in enumerate(candidates) if kind_of(name) == kind]
        named = {str(f): own for f, own in enumerate(columns)}
        reads = any(INTERACTIONS[kind].reads_tokens for kind in self.kinds)
        self.tokens = Tokens(named, in_dim, token_dim) if reads else None

    def forward(self, x_BD: Tensor, weight_O: Tensor) -> Tensor:
        """y_BH, the mixture of all candidates."""
        token_BFW = None if self.tokens is None else self.tokens(x_BD)
        parts = [
            operation.mixture(x_BD, token_BFW, weight_O[self.places[kind]])
            for kind, operation in self.kinds.items()
            if isinstance(operation, Interaction)
        ]
        return torch.stack(parts).sum(0)

    def one(self, x_BD: Tensor, choice: int) -> Tensor:
        """y_BH of one candidate, by its index."""
        kind = next(kind for kind, places in self.places.items() if choice in places)
        operation = self.kinds[kind]
        assert isinstance(operation, Interaction)
        token_BFW = self.tokens(x_BD) if operation.reads_tokens and self.tokens is not None else None
        return operation.one(x_BD, token_BFW, self.places[kind].index(choice))

    def skip(self, x_BD: Tensor) -> Tensor | None:
        """y_BH of the candidate `skip`, None without one."""
        return self.one(x_BD, self.places["skip"][0]) if "skip" in self.places else None


def split_name(name: str) -> tuple[str, str]:
    """Kind and size of a name: mlp_64 is mlp and 64, skip is skip and the empty text."""
    kind, _, size = name.partition("_")
    return kind, size


def kind_of(name: str) -> str:
    """The kind of a name."""
    return split_name(name)[0]


def check_names(names: Sequence[str], kinds: Mapping[str, type[Operation] | type[Interaction]], where: str) -> None:
    """Raises UserError for a name that is no operation of these kinds, or has no size that they have."""
    for name in names:
        kind, size = split_name(name)
        if kind not in kinds:
            raise UserError(f"{where}: {name} is not one of {', '.join(kinds)}, most with a size, as in mlp_64")
        try:
            kinds[kind].check_size(size)
        except UserError as error:
            raise UserError(f"{where}: {name}: {error}") from None


def sizes_by_kind(
    names: Sequence[str], kinds: Mapping[str, type[Operation] | type[Interaction]]
) -> dict[str, list[str]]:
    """Of each kind its sizes, in order."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        kind, size = split_name(name)
        assert kind in kinds
        found[kind].append(size)
    return dict(found)
