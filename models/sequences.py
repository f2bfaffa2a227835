"""Bags that are read item by item: their tables, their items next to the pooled features, and attention pooling."""

# Shapes: B rows, J sequences, L items of the longest, D width of their table, W of a token, E of all embeddings, P of its
# pooled part, V items of a jagged feature.

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor

from features.errors import UserError
from features.kinds.bag import Bag
from features.schema.schema import Schema
from models.layers import StackedLinear, StackedMLP

ACTIVATION_UNIT = (36,)  # hidden layers, arXiv 1706.06978, figure 2


class WithItems(NamedTuple):
    """The input of a fusion that reads sequences.

    Attributes:
        x_BFW: a token a feature; for a sequence, of its pooled vector (Interests).
        item_BJLW: a token an item. present_BJL: where there is one; the content of the others is undefined.
    """

    x_BFW: Tensor
    item_BJLW: Tensor
    present_BJL: Tensor


def sequences_of(schema: Schema) -> dict[str, Bag]:
    """The bags that are read as sequences, in the schema's order."""
    return {name: bag for name, bag in schema.bag.items() if bag.pooling == "sequence"}


def unpooled_tables(schema: Schema) -> set[str]:
    """Tables that a sequence reads: they look up item by item for all their features, since a table belongs to one collection.

    Raises:
        UserError: they differ in width.
    """
    tables = {schema.table_of(name) for name in sequences_of(schema)}
    widths = {schema.all_tables[table].dim for table in tables}
    if len(widths) > 1:
        raise UserError(
            f"tables {', '.join(sorted(tables))} have dim {', '.join(map(str, sorted(widths)))}: tables that are read as "
            "sequences (pooling: sequence) need the same"
        )
    return tables


def pooled_features(schema: Schema) -> list[str]:
    """All id features but the sequences."""
    return [name for name in schema.sparse if name not in sequences_of(schema)]


def mean_pooled(found: Mapping[str, JaggedTensor], lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """For each feature that is no sequence, the mean of its items, mean_BD; 0 for an empty bag."""
    return {name: _mean(items) for name, items in found.items() if name not in lengths}


def concat_items(found: Mapping[str, JaggedTensor], lengths: Mapping[str, int]) -> list[Tensor]:
    """The items of all sequences, padded with 0 to L each, then how many each has: [item_B(JLD), count_BJ].

    Args:
        lengths: the most items of each sequence.
    """
    longest = max(lengths.values())
    items = [found[name].to_padded_dense(longest).flatten(1) for name in lengths]
    counts = [found[name].lengths() for name in lengths]
    return [*items, torch.stack(counts, 1).to(items[0].dtype)]


def _mean(items: JaggedTensor) -> Tensor:
    # Its checks of the lengths would wait for a GPU.
    sum_BD = torch.segment_reduce(items.values(), "sum", lengths=items.lengths(), unsafe=True)
    return sum_BD / items.lengths().clamp(min=1).unsqueeze(1)


class Interests(nn.Module):
    """Each sequence as one vector: the sum of its items, weighed by how they fit the candidate (DIN; arXiv 1706.06978, eq. 3).

    A small network of its own, the activation unit, gives an item's weight from the item and the candidate (section 4.3); there
    is no softmax, so that many fitting items count for more than one. In place of the paper's outer product it reads difference
    and product, and its hidden layer has ReLU. Without a candidate, which is then 0, the item alone decides.

    Args:
        num_sequences: J. dim: D.
    Shapes: item_BJLD, present_BJL, candidate_BJD -> interest_BJD.
    """

    def __init__(self, num_sequences: int, dim: int) -> None:
        super().__init__()
        self.hidden = StackedMLP(num_sequences, 4 * dim, ACTIVATION_UNIT)
        self.out = StackedLinear(num_sequences, ACTIVATION_UNIT[-1], 1)

    def forward(self, item_BJLD: Tensor, present_BJL: Tensor, candidate_BJD: Tensor) -> Tensor:
        candidate_BJLD = candidate_BJD.unsqueeze(2).expand_as(item_BJLD)
        pair_BJLD = torch.cat(
            [item_BJLD, candidate_BJLD, item_BJLD - candidate_BJLD, item_BJLD * candidate_BJLD], 3
        )  # fmt: skip
        weight_JBL = self.out(self.hidden(pair_BJLD.transpose(0, 1).flatten(1, 2))).view_as(present_BJL.transpose(0, 1))
        return torch.einsum("bjl,bjld->bjd", weight_JBL.transpose(0, 1) * present_BJL, item_BJLD)


class Sequences(nn.Module):
    """Splits the embeddings: each sequence as one vector next to the pooled features, and its items as tokens.

    The candidate of a sequence is the first categorical feature of its table: what is shown now, against what was seen before.

    Args:
        schema: has at least one sequence. token_dim: W; 0: the fusion does not read items, and there are no tokens.
    Call Args:
        embedding_BE: pooled features, then the items of all sequences, then how many each has (`concat_items`).
    Returns: embedding_BE, pooled features then sequences; item_BJLW or None; present_BJL.
    """

    candidate_JD: Tensor
    place_L: Tensor

    def __init__(self, schema: Schema, token_dim: int) -> None:
        super().__init__()
        sequences, pooled = sequences_of(schema), pooled_features(schema)
        dims = {name: schema.all_tables[schema.table_of(name)].dim for name in schema.sparse}
        dim, longest = dims[next(iter(sequences))], max(bag.max_length for bag in sequences.values())
        width = sum(dims[name] for name in pooled)
        self.item_shape = (len(sequences), longest, dim)
        self.widths = [width, len(sequences) * longest * dim, len(sequences)]
        first = {name: sum(dims[other] for other in pooled[:place]) for place, name in enumerate(pooled)}
        candidates = [_candidate(schema, name) for name in sequences]
        columns = [[width] * dim if c is None else range(first[c], first[c] + dim) for c in candidates]
        self.register_buffer("candidate_JD", torch.tensor([list(own) for own in columns]), persistent=False)
        self.register_buffer("place_L", torch.arange(longest), persistent=False)
        self.interests = Interests(len(sequences), dim)
        self.tokens = StackedLinear(len(sequences), dim, token_dim) if token_dim else None

    def forward(self, embedding_BE: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        pooled_BP, item_BE, count_BJ = embedding_BE.split(self.widths, 1)
        item_BJLD = item_BE.unflatten(1, self.item_shape)
        present_BJL = self.place_L < count_BJ.unsqueeze(2)
        candidate_BJD = nn.functional.pad(pooled_BP, (0, 1))[:, self.candidate_JD]  # column P holds zeros
        interest_BJD = self.interests(item_BJLD, present_BJL, candidate_BJD)
        return torch.cat([pooled_BP, interest_BJD.flatten(1)], 1), self._tokens(item_BJLD), present_BJL

    def _tokens(self, item_BJLD: Tensor) -> Tensor | None:
        if self.tokens is None:
            return None
        token_JNW = self.tokens(item_BJLD.transpose(0, 1).flatten(1, 2))
        return token_JNW.unflatten(1, (-1, self.item_shape[1])).transpose(0, 1)


def _candidate(schema: Schema, sequence: str) -> str | None:
    table = schema.table_of(sequence)
    return next((name for name in schema.categorical if schema.table_of(name) == table), None)
