"""Reference of STEM-Net: one row, task and expert at a time, parameters by name (see loops.py)."""

# Shapes: B rows, S sets of embeddings, D width of one, E experts.

from collections.abc import Sequence

import torch
from references.loops import Params, mix, mlp, softmax
from torch import Tensor


def stem(
    params: Params, x_BSD: Tensor, counts: Sequence[int], depth: int, gate_depth: int
) -> tuple[Tensor, list[Tensor]]:
    """h_BTH, and each task's weights of the experts.

    Args:
        counts: experts on each set, the shared one last. depth, gate_depth: layers of an expert, hidden layers of a gate.
    """
    set_of = [s for s, count in enumerate(counts) for _ in range(count)]
    shared, outputs, weights = len(counts) - 1, [], []
    for x_SD in x_BSD:
        experts = [mlp(params, "experts.", e, depth, x_SD[s]) for e, s in enumerate(set_of)]
        rows, own_weights = [], []
        for task in range(shared):
            hidden = mlp(params, "gate_hidden.", task, gate_depth, x_SD[task] + x_SD[shared])
            score_E = hidden @ params["gate.weight_SDH"][task] + params["gate.bias_SH"][task]
            weight_E = softmax(list(score_E))
            # An expert of another task counts as a constant.
            read = [h if s in (task, shared) else h.detach() for h, s in zip(experts, set_of, strict=True)]
            rows.append(mix(weight_E, read))
            own_weights.append(torch.stack(weight_E))
        outputs.append(torch.stack(rows))
        weights.append(torch.stack(own_weights))
    return torch.stack(outputs), [torch.stack(weights)]
