"""The fusions that attend over features as research code writes them: as plain_towers.py, whose remarks hold here too."""

# Shapes: B rows, T tasks, F features, W width of a token, S places of a sequence, K pieces of something, P points.

import math
from collections.abc import Iterator, Sequence

import torch
from plain_towers import Pair, linear_pairs, mlp_pairs, mlps
from torch import Tensor, nn
from torch.nn import functional


def same_pairs(plain: nn.Module, ours: nn.Module) -> Iterator[Pair]:
    """Of two modules with the same parameters in the same order."""
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        yield one, other, lambda tensor: tensor


def attention(q: Tensor, k: Tensor, v: Tensor, sees_SS: Tensor) -> Tensor:
    score = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return score.masked_fill(~sees_SS, -torch.inf).softmax(-1) @ v


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
        x_BSW = x_BSW + self.join(attention(q, k, v, sees_SS))
        return self.norm_out(x_BSW + self.network(self.norm_network(x_BSW)))


class AutoTask(nn.Module):
    def __init__(self, in_dim: int, num_tasks: int, num_fields: int, width: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        inner = math.ceil((in_dim + num_tasks) / 8) * 8
        self.fill, self.out_dim = inner - in_dim - num_tasks, num_fields * inner + width
        self.position_FW = nn.Parameter(torch.randn(num_fields, inner))
        self.over_features, self.over_examples = GPTBlock(inner), GPTBlock(width)
        self.example = nn.Linear(num_fields * in_dim + num_tasks, width)

    def forward(self, x_BFD: Tensor) -> list[Tensor]:
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
        return [torch.cat([one, facet2_BTW[:, task]], 1) for task, one in enumerate(facet1)]

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        yield self.position_FW, ours.position_FW, lambda tensor: tensor
        for name in ("over_features", "over_examples", "example"):
            yield from same_pairs(getattr(self, name), getattr(ours, name))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.forward_norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_BSW: Tensor, sees_SS: Tensor) -> Tensor:
        y_BSW = self.norm(x_BSW)
        parts = (self.query(y_BSW), *self.key_value(y_BSW).chunk(2, 2))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        x_BSW = x_BSW + self.out(attention(q, k, v, sees_SS).transpose(1, 2).flatten(2))
        return x_BSW + self.down(torch.relu(self.up(self.forward_norm(x_BSW))))


class MultiTab(nn.Module):
    """Mask TxT: a task does not see other tasks. Every block renews all tokens."""

    def __init__(self, in_dim: int, num_tasks: int, num_fields: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, in_dim
        self.task_TW = nn.Parameter(torch.randn(num_tasks, in_dim))
        self.blocks = nn.ModuleList(Block(in_dim, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(in_dim)
        sees_SS = torch.ones(num_tasks + num_fields, num_tasks + num_fields, dtype=torch.bool)
        sees_SS[:num_tasks, :num_tasks] = torch.eye(num_tasks, dtype=torch.bool)
        self.register_buffer("sees_SS", sees_SS)

    def forward(self, x_BFW: Tensor) -> list[Tensor]:
        x_BSW = torch.cat([self.task_TW.expand(len(x_BFW), -1, -1), x_BFW], 1)
        for block in self.blocks:
            x_BSW = block(x_BSW, self.sees_SS)
        return list(self.norm(x_BSW)[:, : self.num_tasks].unbind(1))

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        return same_pairs(self, ours)


class Excitation(nn.Module):
    def __init__(self, num_fields: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(num_fields, hidden), nn.Linear(hidden, num_fields)

    def forward(self, x_BFW: Tensor) -> Tensor:
        return 2 * self.excite(torch.relu(self.squeeze(x_BFW.mean(2)))).sigmoid()

    def pairs(self, ours: nn.Module, index: int) -> Iterator[Pair]:
        yield from linear_pairs(self.squeeze, ours.squeeze, index)
        yield from linear_pairs(self.excite, ours.excite, index)


class DTRN(nn.Module):
    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, widths: Sequence[int], behaviours: Sequence[int],
        condition: int, hidden: int, squeeze: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.behaviours, self.out_dim = list(behaviours), widths[-1]
        self.task_TC = nn.Parameter(torch.randn(num_tasks, condition))
        self.behaviour_KC = nn.Parameter(torch.randn(len(behaviours), condition))
        self.task_layer, self.behaviour_layer = nn.Linear(condition, hidden), nn.Linear(condition, hidden, bias=False)
        self.generate = nn.Linear(hidden, 2 * in_dim)
        self.up, self.down = nn.Linear(in_dim, hidden), nn.Linear(hidden, in_dim)
        self.excitations = nn.ModuleList(Excitation(num_fields, squeeze) for _ in range(num_tasks))
        self.networks = mlps(num_tasks, [num_fields * in_dim, *widths])

    def forward(self, x_BFW: Tensor) -> list[Tensor]:
        out = []
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
            out.append(network((read_BFW * excitation(read_BFW).unsqueeze(2)).flatten(1)))
        return out

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        for name in ("task_TC", "behaviour_KC"):
            yield getattr(self, name), getattr(ours.interests, name), lambda tensor: tensor
        for name in ("task_layer", "behaviour_layer", "generate", "up", "down"):
            yield from same_pairs(getattr(self, name), getattr(ours.interests, name))
        for task, excitation in enumerate(self.excitations):
            yield from excitation.pairs(ours.excitation, task)
        yield from mlp_pairs(self.networks, ours.networks)


class Group(nn.Module):
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

    def pairs(self, ours: nn.Module, index: int) -> Iterator[Pair]:
        for name in ("ask", "out", "value_query", "point_key_value", "up", "down"):
            yield from linear_pairs(getattr(self, name), getattr(ours, name), index)
        yield from self.excitation.pairs(ours.excitation, index)


class APEM(nn.Module):
    """One layer of groups."""

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, widths: Sequence[int], groups: int, points: int, hidden: int,
        squeeze: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_dim = widths[-1]
        self.groups = nn.ModuleList(Group(num_fields, in_dim, points, hidden, squeeze) for _ in range(groups))
        self.norm = nn.LayerNorm(in_dim, elementwise_affine=False)
        self.indicators = nn.ParameterList(torch.randn(in_dim) for _ in range(num_tasks))
        self.networks = mlps(num_tasks, [num_fields * in_dim, *widths])

    def forward(self, x_BFW: Tensor) -> list[Tensor]:
        pattern_BGFW = torch.stack([group(x_BFW) for group in self.groups], 1)
        out = []
        for indicator_W, network in zip(self.indicators, self.networks, strict=True):
            score_BGF = self.norm(pattern_BGFW) @ indicator_W / math.sqrt(len(indicator_W))
            weight_BGF = score_BGF.flatten(1).softmax(1).view_as(score_BGF)
            out.append(network(x_BFW.shape[1] * (weight_BGF.unsqueeze(3) * pattern_BGFW).sum(1).flatten(1)))
        return out

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        for index, group in enumerate(self.groups):
            yield from group.pairs(ours.blocks[0], index)
        for task, indicator_W in enumerate(self.indicators):
            yield indicator_W, ours.indicator_TW, lambda indicator_TW, task=task: indicator_TW[task]
        yield from mlp_pairs(self.networks, ours.networks)
