"""Operations that the feature-interaction block chooses from (AutoMTL, section 3.3.1 and table 1), x_BD -> y_BH.

The paper leaves open how outputs of unlike width are mixed. Here every kind of operation projects to H, and the sizes of a kind
share that projection: cross networks of every depth, attention with any number of heads, and MLPs, whose narrow ones are the
first columns of the widest (models.automtl.operations.MLP). The product layers share what they read of the input itself.
"""

# Shapes: B rows, D width in, F features, W width of a token, P pairs of features, H width out, C sizes, M heads, V = W / M.

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from features.errors import UserError
from models.automtl.operations import MLP, is_size


class Fields(NamedTuple):
    """What an interaction is built for: D, F and W."""

    in_dim: int
    number: int
    token_dim: int


class Interaction(nn.Module):
    """A kind of interaction in C sizes: (fields, width, sizes).

    Attributes:
        choices: what a name has after its underscore; (): nothing. A whole number from 1 to 65536 where it is None.
        reads_tokens: it reads a token of each feature.
    """

    choices: ClassVar[tuple[str, ...] | None] = None
    reads_tokens: ClassVar[bool] = False

    @classmethod
    def check_size(cls, size: str) -> None:
        """Raises UserError for the text after the underscore of a name that is no size of this kind."""
        if cls.choices is None:
            if not is_size(size):
                raise UserError("it needs a size after an underscore, a whole number from 1 to 65536")
        elif size not in (cls.choices or ("",)):
            raise UserError(f"after an underscore it has {' or '.join(cls.choices) or 'nothing'}")

    def mixture(self, x_BD: Tensor, token_BFW: Tensor | None, weight_C: Tensor) -> Tensor:
        """y_BH, the weighted sum of the sizes' outputs."""
        raise NotImplementedError

    def one(self, x_BD: Tensor, token_BFW: Tensor | None, size: int) -> Tensor:
        """y_BH of one size, by its index."""
        raise NotImplementedError


class Product(Interaction):
    """W_z x + W_p p + b: the input and products of its features (PNN; Qu et al. 2016, section III).

    Of the inner kind p are the inner products of all pairs (eq. 8), of the outer kind the outer product of the tokens' sum with
    itself (eq. 13). W_z and b are one for both.
    """

    choices = ("inner", "outer")
    reads_tokens = True
    pair_P: Tensor

    def __init__(self, fields: Fields, width: int, sizes: Sequence[str]) -> None:
        super().__init__()
        first_P, second_P = torch.triu_indices(fields.number, fields.number, offset=1, device="cpu")
        self.register_buffer("pair_P", first_P * fields.number + second_P, persistent=False)
        self.sizes, self.input = list(sizes), nn.Linear(fields.in_dim, width)
        lengths = {"inner": len(first_P), "outer": fields.token_dim**2}
        self.products = nn.ModuleDict({kind: nn.Linear(lengths[kind], width, bias=False) for kind in sizes})

    def mixture(self, x_BD: Tensor, token_BFW: Tensor | None, weight_C: Tensor) -> Tensor:
        parts = [weight_C[c] * self._products(token_BFW, kind) for c, kind in enumerate(self.sizes)]
        return torch.stack([weight_C.sum() * self.input(x_BD), *parts]).sum(0)

    def one(self, x_BD: Tensor, token_BFW: Tensor | None, size: int) -> Tensor:
        return self.input(x_BD) + self._products(token_BFW, self.sizes[size])

    def _products(self, token_BFW: Tensor | None, kind: str) -> Tensor:
        assert token_BFW is not None
        if kind == "inner":
            product_BFF = torch.bmm(token_BFW, token_BFW.transpose(1, 2))
            return self.products[kind](product_BFF.flatten(1).index_select(1, self.pair_P))
        sum_BW = token_BFW.sum(1)
        return self.products[kind]((sum_BW.unsqueeze(2) * sum_BW.unsqueeze(1)).flatten(1))


class Cross(Interaction):
    """W x_l + b after l layers x_(l+1) = x_0 (x_l^T w_l) + b_l + x_l (DCN; Wang et al. 2017, eq. 3), by depth l."""

    def __init__(self, fields: Fields, width: int, sizes: Sequence[str]) -> None:
        super().__init__()
        self.depths = [int(size) for size in sizes]
        bound = 1 / math.sqrt(fields.in_dim)
        self.weight_LD = nn.Parameter(torch.empty(max(self.depths), fields.in_dim).uniform_(-bound, bound))
        self.bias_LD = nn.Parameter(torch.zeros(max(self.depths), fields.in_dim))
        self.out = nn.Linear(fields.in_dim, width)

    def mixture(self, x_BD: Tensor, token_BFW: Tensor | None, weight_C: Tensor) -> Tensor:  # noqa: ARG002
        layers = self._layers(x_BD, max(self.depths))
        # The projection is linear, so one of the mixed layers will do.
        mixed_BD = torch.stack([weight_C[c] * layers[depth] for c, depth in enumerate(self.depths)]).sum(0)
        return F.linear(mixed_BD, self.out.weight) + weight_C.sum() * self.out.bias

    def one(self, x_BD: Tensor, token_BFW: Tensor | None, size: int) -> Tensor:  # noqa: ARG002
        return self.out(self._layers(x_BD, self.depths[size])[-1])

    def _layers(self, x_BD: Tensor, depth: int) -> list[Tensor]:
        layers = [x_BD]
        for layer in range(depth):  # over numbers, as parameters cannot be iterated where the forward is traced
            product_B1 = (layers[-1] @ self.weight_LD[layer]).unsqueeze(1)
            layers.append(torch.addcmul(layers[-1] + self.bias_LD[layer], x_BD, product_B1))
        return layers


class Attention(Interaction):
    """W (tokens + attention of the tokens to one another) + b (Vaswani et al. 2017, section 3.2.2), by the number of heads.

    Queries, keys and values are projected by the same matrices whatever the number of heads, which share their columns.
    """

    reads_tokens = True

    def __init__(self, fields: Fields, width: int, sizes: Sequence[str]) -> None:
        super().__init__()
        self.heads = [int(size) for size in sizes]
        if wrong := [heads for heads in self.heads if fields.token_dim % heads]:
            raise UserError(f"attention_{wrong[0]}: token_dim {fields.token_dim} is not a multiple of {wrong[0]}")
        self.projection = nn.Linear(fields.token_dim, 3 * fields.token_dim, bias=False)
        self.out = nn.Linear(fields.number * fields.token_dim, width)

    def mixture(self, x_BD: Tensor, token_BFW: Tensor | None, weight_C: Tensor) -> Tensor:  # noqa: ARG002
        assert token_BFW is not None
        projected_BFN = self.projection(token_BFW)
        parts = [weight_C[c] * self._attended(projected_BFN, heads) for c, heads in enumerate(self.heads)]
        mixed_BFW = torch.stack([weight_C.sum() * token_BFW, *parts]).sum(0)
        return F.linear(mixed_BFW.flatten(1), self.out.weight) + weight_C.sum() * self.out.bias

    def one(self, x_BD: Tensor, token_BFW: Tensor | None, size: int) -> Tensor:  # noqa: ARG002
        assert token_BFW is not None
        return self.out((token_BFW + self._attended(self.projection(token_BFW), self.heads[size])).flatten(1))

    def _attended(self, projected_BFN: Tensor, heads: int) -> Tensor:
        part_3BMFV = projected_BFN.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BMFV = F.scaled_dot_product_attention(part_3BMFV[0], part_3BMFV[1], part_3BMFV[2])
        return mixed_BMFV.transpose(1, 2).flatten(2)


class Perceptron(Interaction):
    """W2 relu(W1 x + b1) + b2, by hidden width: see models.automtl.operations.MLP."""

    def __init__(self, fields: Fields, width: int, sizes: Sequence[str], nested: bool = True) -> None:
        super().__init__()
        self.mlp = MLP(1, width, sizes, nested, fields.in_dim)

    def mixture(self, x_BD: Tensor, token_BFW: Tensor | None, weight_C: Tensor) -> Tensor:  # noqa: ARG002
        return self.mlp.mixture(x_BD.unsqueeze(0), weight_C.unsqueeze(0)).squeeze(0)

    def one(self, x_BD: Tensor, token_BFW: Tensor | None, size: int) -> Tensor:  # noqa: ARG002
        return self.mlp.one(x_BD.unsqueeze(0), size).squeeze(0)


class Projection(Interaction):
    """W x + b: no interaction."""

    choices = ()

    def __init__(self, fields: Fields, width: int, sizes: Sequence[str]) -> None:  # noqa: ARG002
        super().__init__()
        self.out = nn.Linear(fields.in_dim, width)

    def mixture(self, x_BD: Tensor, token_BFW: Tensor | None, weight_C: Tensor) -> Tensor:
        return weight_C[0] * self.one(x_BD, token_BFW, 0)

    def one(self, x_BD: Tensor, token_BFW: Tensor | None, size: int) -> Tensor:  # noqa: ARG002
        return self.out(x_BD)


INTERACTIONS: dict[str, type[Interaction]] = {
    "product": Product,
    "cross": Cross,
    "attention": Attention,
    "mlp": Perceptron,
    "skip": Projection,
}
