"""Private names of torch that models use; tests/pipeline/test_torch_compat.py checks them."""

from typing import Any

import torch
from torch import Tensor


def onednn_kernel() -> Any:
    """The operator behind `onednn_linear`, for torch.utils.flop_counter, which does not count it by itself."""
    return torch.ops.mkldnn._linear_pointwise


def onednn_linear(x_BD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + b in float32 on a CPU, through oneDNN and without autograd."""
    return torch.ops.mkldnn._linear_pointwise(x_BD, weight_ND, bias_N, "none", [], "")
