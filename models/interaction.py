"""Interactions between input and fusion, x_BD -> x_BI: products of features that a layer on their sum has to imitate."""

# Shapes: B rows, D width in, I width out, F features, W width of a token, P pairs of features, H heads, V = W / H.

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from features.errors import UserError
from models.inputs import Inputs, Tokens
from models.registry import build, chosen


class Interaction(nn.Module):
    """Base of all interactions: (in_dim, …), or (in_dim, columns, field_dim, …) where `fields` is set.

    Attributes:
        fields: it reads tokens of the features, which it makes of their columns of x_BD.
        out_dim: I.
    Shapes: x_BD -> x_BI.
    """

    fields: ClassVar[bool] = False
    out_dim: int


class Concat(Interaction):
    """No interaction: the features concatenated, unchanged.

    Args:
        in_dim: D = I.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.out_dim = in_dim

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD


class Dot(Interaction):
    """Inner products of all pairs of features beside the input (DLRM; Naumov et al., arXiv 1906.00091, section 2.2).

    The paper's vectors are the embeddings, all of one width, and one that a network makes of all numbers; here each feature
    has a layer of its own to a token, so that widths may differ and each number is a feature. Beside the products the paper
    keeps what came of the numbers, here all of the input is kept.

    Args:
        in_dim: D. columns: of each feature in x_BD. field_dim: W.
    Shapes: x_BD -> x_BI, I = D + F (F - 1) / 2.
    """

    fields = True
    pair_P: Tensor

    def __init__(self, in_dim: int, columns: Mapping[str, Sequence[int]], field_dim: int) -> None:
        super().__init__()
        self.tokens = Tokens(columns, in_dim, field_dim)
        first_P, second_P = torch.triu_indices(len(columns), len(columns), offset=1)
        self.register_buffer("pair_P", first_P * len(columns) + second_P, persistent=False)
        self.out_dim = in_dim + len(first_P)

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BFW = self.tokens(x_BD)
        product_BFF = torch.bmm(x_BFW, x_BFW.transpose(1, 2))
        return torch.cat([x_BD, product_BFF.flatten(1).index_select(1, self.pair_P)], 1)


class Cross(Interaction):
    """Polynomials of the input, one degree a layer: x_(l+1) = x_0 * (W x_l + b) + x_l (DCN-v2; arXiv 2008.13535, eq. 1).

    With a rank R, W = U V^T (eq. 2). The fusion reads the last layer: the paper's stacked structure.

    Args:
        in_dim: D = I. layers: how many. rank: R; None: W is full.
    Shapes: x_BD -> x_BI.
    """

    def __init__(
        self, in_dim: int, layers: Annotated[int, Field(ge=1)], rank: Annotated[int, Field(ge=1)] | None = None
    ) -> None:
        super().__init__()
        self.out_dim = in_dim
        self.layers = nn.ModuleList(
            nn.Linear(in_dim, in_dim)
            if rank is None
            else nn.Sequential(nn.Linear(in_dim, rank, bias=False), nn.Linear(rank, in_dim))
            for _ in range(layers)
        )

    def forward(self, x_BD: Tensor) -> Tensor:
        h_BD = x_BD
        for layer in self.layers:
            h_BD = torch.addcmul(h_BD, x_BD, layer(h_BD))
        return h_BD


class Attention(Interaction):
    """Features attend to one another, layer upon layer (AutoInt; Song et al., arXiv 1810.11921, section 4.4, eq. 5-8).

    Scores are not divided by the root of the width, and nothing has a bias, as in the paper. There the width of a head is
    free; here tokens keep their width W, and each head has its share of it. The fusion reads the last tokens beside the
    input, as in AutoInt+ a network reads the input beside the attention.

    Args:
        in_dim: D. columns: of each feature in x_BD. field_dim: W. layers: how many. heads: H, a divisor of W.
    Shapes: x_BD -> x_BI, I = D + F W.
    Raises:
        UserError: W is not a multiple of H.
    """

    fields = True

    def __init__(
        self, in_dim: int, columns: Mapping[str, Sequence[int]], field_dim: int,
        layers: Annotated[int, Field(ge=1)] = 3, heads: Annotated[int, Field(ge=1)] = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        if field_dim % heads:
            raise UserError(f"model.interaction.heads: model.field_dim {field_dim} is not a multiple of {heads}")
        self.heads, self.out_dim = heads, in_dim + len(columns) * field_dim
        self.tokens = Tokens(columns, in_dim, field_dim)
        # Query, key, value and residual in one product.
        self.layers = nn.ModuleList(nn.Linear(field_dim, 4 * field_dim, bias=False) for _ in range(layers))

    def forward(self, x_BD: Tensor) -> Tensor:
        h_BFW = self.tokens(x_BD)
        for layer in self.layers:
            *parts, residual_BFW = layer(h_BFW).chunk(4, 2)
            query_BHFV, key_BHFV, value_BHFV = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in parts)
            mixed_BHFV = F.scaled_dot_product_attention(query_BHFV, key_BHFV, value_BHFV, scale=1.0)
            h_BFW = torch.relu(mixed_BHFV.transpose(1, 2).flatten(2) + residual_BFW)
        return torch.cat([x_BD, h_BFW.flatten(1)], 1)


INTERACTIONS: dict[str, type[Interaction]] = {"concat": Concat, "dot": Dot, "cross": Cross, "attention": Attention}


def build_interaction(config: Mapping[str, Any], inputs: Inputs, field_dim: int) -> Interaction:
    """The interaction named `config["name"]` with the other keys as its arguments.

    Args:
        inputs: which make x_BD. field_dim: W.
    Raises:
        UserError: an unknown name, or arguments that the class does not take.
    """
    kind = chosen("interaction", INTERACTIONS, config)
    sizes = (inputs.out_dim, inputs.columns, field_dim) if kind.fields else (inputs.out_dim,)
    return build("interaction", kind, config, *sizes)
