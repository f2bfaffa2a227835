"""References of the fusions that attend over features: MultiTab-Net, DTRN, APEM and AutoTask (see layers.py)."""

# Shapes: B rows, T tasks, F features, W width of a token, G groups, S places of a sequence, P points, H hidden.

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from references.layers import Pair, Reference, linear_pairs, mlp_pairs, mlps, same_pairs
from torch import Tensor, nn
from torch.nn import functional


def attention(q: Tensor, k: Tensor, v: Tensor, sees_SS: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k / sqrt(width)) v over the places seen, and the softmax."""
    score = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weight = score.masked_fill(~sees_SS, -torch.inf).softmax(-1)
    return weight @ v, weight


class GPTBlock(nn.Module):
    """One head, causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_network, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BSW: Tensor) -> Tensor:
        sees_SS = torch.ones(x_BSW.shape[1], x_BSW.shape[1], dtype=torch.bool, device=x_BSW.device).tril()
        q, k, v = self.project(self.norm_attention(x_BSW)).chunk(3, 2)
        x_BSW = x_BSW + self.join(attention(q, k, v, sees_SS)[0])
        return self.norm_out(x_BSW + self.network(self.norm_network(x_BSW)))


class AutoTask(Reference):
    """Ids of tasks are one-hot; all tasks of a row are one block, in random order during training."""

    def __init__(self, in_dim: int, num_tasks: int, num_fields: int, width: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        inner = math.ceil((in_dim + num_tasks) / 8) * 8
        self.fill, self.out_dim = inner - in_dim - num_tasks, num_fields * inner + width
        self.position_FW = nn.Parameter(torch.randn(num_fields, inner))
        self.over_features, self.over_examples = GPTBlock(inner), GPTBlock(width)
        self.example = nn.Linear(num_fields * in_dim + num_tasks, width)

    def run(self, x_BFD: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        rows, fields = x_BFD.shape[:2]
        facet1, examples = [], []
        for task in range(self.num_tasks):
            id_T = functional.one_hot(torch.tensor(task, device=x_BFD.device), self.num_tasks).to(x_BFD)
            id_BFT = functional.pad(id_T, (0, self.fill)).expand(rows, fields, -1)
            facet1.append(self.over_features(torch.cat([x_BFD, id_BFT], 2) + self.position_FW).flatten(1))
            examples.append(self.example(torch.cat([x_BFD.flatten(1), id_T.expand(rows, -1)], 1)))
        example_BTW = torch.stack(examples, 1)
        if self.training:
            order_BT1 = torch.rand(rows, self.num_tasks, device=x_BFD.device).argsort(1).unsqueeze(2)
            order_BTW = order_BT1.expand_as(example_BTW)
            facet2_BTW = self.over_examples(example_BTW.gather(1, order_BTW)).gather(1, order_BTW.argsort(1))
        else:
            facet2_BTW = self.over_examples(example_BTW)
        return [torch.cat([one, facet2_BTW[:, task]], 1) for task, one in enumerate(facet1)], []

    def pairs(self, module: Any) -> Iterator[Pair]:
        yield self.position_FW, module.position_FW, lambda tensor: tensor
        for name in ("over_features", "over_examples", "example"):
            yield from same_pairs(getattr(self, name), getattr(module, name))


class Block(nn.Module):
    """z = x + drop(out(attention(norm x))); z + down(drop(gelu(up(norm z)))), every place renewed, weights dropped as well.

    alone: a place sees itself only, whatever it is given, and the queries and keys are numbers that do not matter.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, dropout: float, attention_dropout: float, alone: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout
        self.norm = nn.LayerNorm(dim)
        self.query = None if alone else nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim if alone else 2 * dim), nn.Linear(dim, dim)
        self.forward_norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def drop(self, x: Tensor, share: float) -> Tensor:
        return functional.dropout(x, share, self.training)

    def forward(self, x_BSW: Tensor, sees_SS: Tensor) -> tuple[Tensor, Tensor]:
        y_BSW = self.norm(x_BSW)
        if self.query is None:
            parts = (torch.cos(y_BSW), torch.sin(y_BSW), self.value(y_BSW))
            sees_SS = torch.eye(y_BSW.shape[1], dtype=torch.bool)
        else:
            parts = (self.query(y_BSW), *self.value(y_BSW).chunk(2, 2))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        weight_BHSS = attention(q, k, v, sees_SS)[1]
        heads_BHSV = self.drop(weight_BHSS, self.attention_dropout) @ v
        x_BSW = x_BSW + self.drop(self.out(heads_BHSV.transpose(1, 2).flatten(2)), self.dropout)
        u_BSH = self.up(self.forward_norm(x_BSW))
        gelu_BSH = u_BSH * (1 + torch.erf(u_BSH / math.sqrt(2))) / 2
        return x_BSW + self.down(self.drop(gelu_BSH, self.dropout)), weight_BHSS


class MultiTab(Reference):
    """Task tokens before feature tokens, every block renews all of them; a task takes its own token.

    Args:
        mask: "FxT": features do not see tasks; "TxT": a task does not see other tasks; "FxT_TxT": both; or "none".
        rows: "batch": after each block, one over rows, a row's tokens side by side as one; "alone": a row sees itself alone.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, layers: int, heads: int, hidden: int, mask: str = "TxT",
        rows: str = "none", dropout: float = 0.0, attention_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_tasks, self.out_dim, self.rows, self.dropout = num_tasks, in_dim, rows, dropout
        self.task_TW = nn.Parameter(torch.randn(num_tasks, in_dim))
        self.blocks = nn.ModuleList(Block(in_dim, heads, hidden, dropout, attention_dropout) for _ in range(layers))
        places = num_tasks + num_fields
        across = attention_dropout if rows == "batch" else 0.0
        count = 0 if rows == "none" else layers
        self.row_blocks = nn.ModuleList(
            Block(places * in_dim, heads, hidden, dropout, across, rows == "alone") for _ in range(count)
        )
        sees_SS = torch.ones(places, places, dtype=torch.bool)
        if mask in ("FxT", "FxT_TxT"):
            sees_SS[num_tasks:, :num_tasks] = False
        if mask in ("TxT", "FxT_TxT"):
            sees_SS[:num_tasks, :num_tasks] = torch.eye(num_tasks, dtype=torch.bool)
        self.register_buffer("sees_SS", sees_SS)

    def run(self, x_BFW: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        x_BSW = torch.cat([self.task_TW.expand(len(x_BFW), -1, -1), x_BFW], 1)
        x_BSW = functional.dropout(x_BSW, self.dropout, self.training)
        sees_BB = torch.ones(len(x_BFW), len(x_BFW), dtype=torch.bool, device=x_BFW.device)
        for index, block in enumerate(self.blocks):
            x_BSW, weight_BHSS = block(x_BSW, self.sees_SS)
            if self.rows != "none":
                x_BSW = self.row_blocks[index](x_BSW.flatten(1).unsqueeze(0), sees_BB)[0][0].view_as(x_BSW)
        return list(x_BSW[:, : self.num_tasks].unbind(1)), [[weight_BHSS]]

    def gates(self, x_BFW: Tensor) -> list[Tensor]:
        """How much the last block attends from each task to each feature, the mean of the heads: weight_BTF."""
        [[weight_BHSS]] = self.run(x_BFW)[1]
        return [weight_BHSS.mean(1)[:, : self.num_tasks, self.num_tasks :]]

    def pairs(self, module: Any) -> Iterator[Pair]:
        return same_pairs(self, module)


class Excitation(nn.Module):
    """A gate per field: 2 sigmoid(V relu(U z + a) + b), z the mean of each field."""

    def __init__(self, num_fields: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(num_fields, hidden), nn.Linear(hidden, num_fields)

    def forward(self, x_BFW: Tensor) -> Tensor:
        return 2 * self.excite(torch.relu(self.squeeze(x_BFW.mean(2)))).sigmoid()

    def pairs(self, module: Any, index: int) -> Iterator[Pair]:
        yield from linear_pairs(self.squeeze, module.squeeze, index)
        yield from linear_pairs(self.excite, module.excite, index)


class DTRN(Reference):
    """Per task: behaviours as it reads them, every field times its gate, side by side into the task's network.

    A behaviour is read as x + V relu(U (g * norm(x) + b)), 1 + g and b being generated.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, widths: Sequence[int], behaviours: Sequence[int],
        condition: int, hidden: int, squeeze: int, experts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.behaviours, self.out_dim = list(behaviours), widths[-1]
        self.task_TC = nn.Parameter(torch.randn(num_tasks, condition))
        self.behaviour_KC = nn.Parameter(torch.randn(len(behaviours), condition))
        self.task_layer, self.behaviour_layer = nn.Linear(condition, hidden), nn.Linear(condition, hidden, bias=False)
        self.generate = nn.Linear(hidden, 2 * in_dim)
        self.up, self.down = nn.Linear(in_dim, hidden), nn.Linear(hidden, in_dim)
        self.excitations = nn.ModuleList(Excitation(num_fields, squeeze) for _ in range(num_tasks))
        self.networks = mlps(num_tasks, [num_fields * in_dim, *widths], experts)

    def run(self, x_BFW: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        out, weights = [], []
        for task, (excitation, network) in enumerate(zip(self.excitations, self.networks, strict=True)):
            tokens = list(x_BFW.unbind(1))
            for index, field in enumerate(self.behaviours):
                pair_H = torch.relu(
                    self.task_layer(self.task_TC[task]) + self.behaviour_layer(self.behaviour_KC[index])
                )
                scale_W, shift_W = self.generate(pair_H).chunk(2)
                y_BW = (1 + scale_W) * functional.layer_norm(tokens[field], tokens[field].shape[1:]) + shift_W
                tokens[field] = tokens[field] + self.down(torch.relu(self.up(y_BW)))
            read_BFW = torch.stack(tokens, 1)
            weights.append(excitation(read_BFW))
            out.append(network((read_BFW * weights[-1].unsqueeze(2)).flatten(1)))
        return out, [weights]

    def pairs(self, module: Any) -> Iterator[Pair]:
        if self.behaviours:
            for name in ("task_TC", "behaviour_KC"):
                yield getattr(self, name), getattr(module.interests, name), lambda tensor: tensor
            for name in ("task_layer", "behaviour_layer", "generate", "up", "down"):
                yield from same_pairs(getattr(self, name), getattr(module.interests, name))
        for task, excitation in enumerate(self.excitations):
            yield from excitation.pairs(module.excitation, task)
        yield from mlp_pairs(self.networks, module.networks)


class Group(nn.Module):
    """All fields into each point, each field out of the points, feed-forward, gates."""

    def __init__(self, num_fields: int, dim: int, points: int, hidden: int, squeeze: int) -> None:
        super().__init__()
        self.norm, self.forward_norm = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.ask, self.out = nn.Linear(dim, points, bias=False), nn.Linear(dim, dim)
        self.value_query, self.point_key_value = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.excitation = Excitation(num_fields, squeeze)

    def forward(self, x_BFW: Tensor) -> Tensor:
        y_BFW = self.norm(x_BFW)
        v_BFW, q_BFW = self.value_query(y_BFW).chunk(2, 2)
        point_BPW = self.ask(y_BFW).softmax(1).transpose(1, 2) @ v_BFW
        k_BPW, v_BPW = self.point_key_value(point_BPW).chunk(2, 2)
        score_BFP = q_BFW @ k_BPW.transpose(1, 2) / math.sqrt(x_BFW.shape[2])
        x_BFW = x_BFW + self.out(score_BFP.softmax(2) @ v_BPW)
        x_BFW = x_BFW + self.down(torch.relu(self.up(self.forward_norm(x_BFW))))
        return x_BFW * self.excitation(x_BFW).unsqueeze(2)

    def pairs(self, module: Any, index: int) -> Iterator[Pair]:
        for name in ("ask", "out", "value_query", "point_key_value", "up", "down"):
            yield from linear_pairs(getattr(self, name), getattr(module, name), index)
        yield from self.excitation.pairs(module.excitation, index)


class APEM(Reference):
    """Groups make patterns of each field; a task takes a softmax of all, field by field, times F, into its network."""

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, widths: Sequence[int], layers: int = 1, groups: int = 2,
        points: int = 4, hidden: int = 16, squeeze: int = 16, experts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_dim = widths[-1]
        self.blocks = nn.ModuleList(
            nn.ModuleList(Group(num_fields, in_dim, points, hidden, squeeze) for _ in range(groups))
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(in_dim, elementwise_affine=False)
        self.indicators = nn.ParameterList(torch.randn(in_dim) for _ in range(num_tasks))
        self.networks = mlps(num_tasks, [num_fields * in_dim, *widths], experts)

    def run(self, x_BFW: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        patterns = [x_BFW] * len(self.blocks[0])
        for groups in self.blocks:
            patterns = [group(pattern_BFW) for group, pattern_BFW in zip(groups, patterns, strict=True)]
        pattern_BGFW = torch.stack(patterns, 1)
        out, weights = [], []
        for indicator_W, network in zip(self.indicators, self.networks, strict=True):
            score_BGF = self.norm(pattern_BGFW) @ indicator_W / math.sqrt(len(indicator_W))
            weights.append(score_BGF.flatten(1).softmax(1).view_as(score_BGF))
            out.append(network(x_BFW.shape[1] * (weights[-1].unsqueeze(3) * pattern_BGFW).sum(1).flatten(1)))
        return out, [weights]

    def gates(self, x_BFW: Tensor) -> list[Tensor]:
        """Of all groups: weight_BTF."""
        return [weight_BTGF.sum(2) for weight_BTGF in super().gates(x_BFW)]

    def pairs(self, module: Any) -> Iterator[Pair]:
        for layer, groups in enumerate(self.blocks):
            for index, group in enumerate(groups):
                yield from group.pairs(module.blocks[layer], index)
        for task, indicator_W in enumerate(self.indicators):
            yield indicator_W, module.indicator_TW, lambda indicator_TW, task=task: indicator_TW[task]
        yield from mlp_pairs(self.networks, module.networks)
