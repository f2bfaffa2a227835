"""Embeddings and dense columns of a row as one flat vector, or, for fusions that attend, one token a feature."""

# Shapes: B rows, D flat width, E width of all embeddings, S sets of them, F features, N numbers with a code, K bins, W width of
# a code or token, P columns of a feature.

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from features.fit.encoders import Encoders
from features.schema.schema import Schema
from models.layers import StackedLinear
from models.sequences import pooled_features, sequences_of


class Piecewise(nn.Module):
    """Numbers as ramps over quantile bins, each followed by a linear layer of its own and ReLU (arXiv 2203.05556, section 3.2).

    Of bin k the number has gone through clamp((x - b_k) / (b_{k+1} - b_k), 0, 1) (eq. 1). The paper leaves the outer bins
    open; here a number beyond what was fitted counts as the nearest edge.

    Args:
        edges: of each number, ascending, at least 2. dim: W.
    Shapes: x_BN -> code_BNW.
    """

    low_NK: Tensor
    width_NK: Tensor

    def __init__(self, edges: Sequence[Sequence[float]], dim: int) -> None:
        super().__init__()
        bins = max(map(len, edges)) - 1
        low_NK, high_NK = torch.full((2, len(edges), bins), torch.inf)  # a bin past a number's last is never reached
        for n, edge in enumerate(edges):
            low_NK[n, : len(edge) - 1], high_NK[n, : len(edge) - 1] = torch.tensor(edge[:-1]), torch.tensor(edge[1:])
        # Edges that differ may round to the same float32, and 0 / 0 would be NaN.
        width_NK = (high_NK - low_NK).nan_to_num(1.0).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("low_NK", low_NK, persistent=False)
        self.register_buffer("width_NK", width_NK, persistent=False)
        self.linear = StackedLinear(len(edges), bins, dim)

    def forward(self, x_BN: Tensor) -> Tensor:
        ramp_NBK = (x_BN.t().unsqueeze(2) - self.low_NK.unsqueeze(1)) / self.width_NK.unsqueeze(1)
        return torch.relu(self.linear(ramp_NBK.clamp(0, 1))).transpose(0, 1)


class Inputs(nn.Module):
    """Embeddings and dense columns to x_BD: embeddings in the schema's order, sequences last, dense columns, codes of numbers.

    Args:
        schema: features. encoders: for the bins' edges. numeric_dim: W of a piecewise number's code, 0 for none.
        sets: S; if more than 1, the input of each set is its embeddings with the numbers, which are the same for all.
    Attributes:
        out_dim: D.
        columns: per feature (those of ids, then those of numbers) its columns of x_BD: the first number, its code, the rest.
    Call Args:
        embedding_BE: of all id features, concatenated, sequences last; set after set. dense_BD: as a batch has it.
    Returns: x_BD, or x_BSD where there are sets.
    """

    coded_N: Tensor

    def __init__(self, schema: Schema, encoders: Encoders, numeric_dim: int, sets: int = 1) -> None:
        super().__init__()
        self.sets = sets
        numbers = schema.dense_ranges
        coded = [name for name in numbers if schema.features[name].code_bins and numeric_dim]
        first = torch.tensor([numbers[name].start for name in coded], dtype=torch.int64)
        self.register_buffer("coded_N", first, persistent=False)
        self.code = Piecewise([encoders.edges[name] for name in coded], numeric_dim) if coded else None
        own: dict[str, range] = {}
        end = 0
        for name in [*pooled_features(schema), *sequences_of(schema)]:
            own[name] = range(end, end := end + schema.table(name).dim)
        codes = {name: end + schema.dense_width + n * numeric_dim for n, name in enumerate(coded)}
        self.out_dim = end + schema.dense_width + len(coded) * numeric_dim
        self.columns = {name: list(own[name]) for name in schema.sparse}
        for name, places in numbers.items():
            number, *rest = (end + place for place in places)
            code = range(codes[name], codes[name] + numeric_dim) if name in codes else ()
            self.columns[name] = [number, *code, *rest]

    def forward(self, embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:
        parts = [dense_BD]
        if self.code is not None:
            parts.append(self.code(dense_BD[:, self.coded_N]).flatten(1))
        if self.sets == 1:
            return torch.cat([embedding_BE, *parts], 1)
        # The rows of a set lie together in memory, as products of a network a set need them.
        embedding_SBE = embedding_BE.unflatten(1, (self.sets, -1)).transpose(0, 1)
        return torch.cat([embedding_SBE, *(part.expand(self.sets, -1, -1) for part in parts)], 2).transpose(0, 1)


class Tokens(nn.Module):
    """One token a feature: its columns of x_BD through a linear layer of its own, since they differ in width.

    A feature of n columns starts as nn.Linear(n, W) does: weights and bias uniform within 1 / sqrt(n).

    Args:
        columns: of each feature in x_BD. dim: W.
    Shapes: x_BD -> x_BFW.
    """

    column_FP: Tensor

    def __init__(self, columns: Mapping[str, Sequence[int]], in_dim: int, dim: int) -> None:
        super().__init__()
        width = max(map(len, columns.values()))
        padded = [[*own, *[in_dim] * (width - len(own))] for own in columns.values()]  # column D holds zeros
        self.register_buffer("column_FP", torch.tensor(padded), persistent=False)
        self.linear = StackedLinear(len(padded), width, dim)
        scale_F1 = torch.tensor([[math.sqrt(width / max(len(own), 1))] for own in columns.values()])
        assert self.linear.bias_SH is not None
        with torch.no_grad():  # StackedLinear starts as the widest feature would
            self.linear.weight_SDH.mul_(scale_F1.unsqueeze(2))
            self.linear.bias_SH.mul_(scale_F1)

    def forward(self, x_BD: Tensor) -> Tensor:
        x_FPB = nn.functional.pad(x_BD, (0, 1)).t()[self.column_FP]
        return self.linear(x_FPB.transpose(1, 2)).transpose(0, 1)
