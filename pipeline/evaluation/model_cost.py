"""The cost of a model: parameters, and floating-point operations a row."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from features.batch import Batch
from models.ranker import Ranker, is_table
from models.torch_compat import onednn_kernel


@torch.inference_mode()
def model_cost(ranker: Ranker, batch: Batch) -> dict[str, Any]:
    """Parameters outside and inside of the tables, and FLOPs of a row's forward pass (2 for a product and its addition).

    Matrix products and attention are counted (torch.utils.flop_counter); table lookups and elementwise operations are not.
    """
    ranker.eval()
    return dense_cost(ranker, ranker.embedded(batch), batch)


@torch.inference_mode()
def dense_cost(ranker: Ranker, embedding_BE: Tensor, batch: Batch) -> dict[str, Any]:
    """The same of a ranker whose tables need not be there.

    Args:
        embedding_BE: what they would give for the batch.
    """
    ranker.eval()
    with flop_counter() as counter:
        ranker.units(ranker.dense_outputs(embedding_BE, batch))
    tables = sum(p.numel() for n, p in ranker.named_parameters() if is_table(n))
    return {
        "parameters": sum(p.numel() for p in ranker.parameters()) - tables,
        "table_parameters": tables,
        "flops_per_row": counter.get_total_flops() / len(batch.row_id_B),
    }


def flop_counter() -> FlopCounterMode:
    """Counts FLOPs of matrix products and attention; of lookups and elementwise operations none."""
    return FlopCounterMode(display=False, custom_mapping={onednn_kernel(): _linear_flops})


def _linear_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of oneDNN's x W^T, which the counter does not know."""
    return 2 * math.prod(x_shape) * weight_shape[0]
