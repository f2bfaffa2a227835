"""Stacks of small networks computed as batched matrix products, and mixtures of their outputs."""

# Shapes: U inputs, S networks of a stack, C of them that read the same input, B rows, D and H widths in and out, N = C H,
# E experts, T users of them (tasks or units).

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.torch_compat import onednn_linear

ONEDNN = torch.backends.mkldnn.is_available()
ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}
Activation = Literal["relu", "gelu", "silu"]
Norm = Literal["none", "layer"]
Width = Annotated[int, Field(ge=1, le=1 << 16)]
Widths = Annotated[Sequence[Width], Field(min_length=1, max_length=64)]  # of layers
Levels = Annotated[Sequence[Widths], Field(min_length=1, max_length=64)]  # of the layers of each level


class StackedLinear(nn.Module):
    """S linear layers with weights of their own, each applied to its own input, or all to one.

    Args:
        stack: S. in_dim, out_dim: D and H, the same for all. bias: whether they have one.
    Shapes: x_SBD, or x_1BD for all -> y_SBH.
    """

    def __init__(self, stack: int, in_dim: int, out_dim: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)  # as nn.Linear does
        self.weight_SDH = nn.Parameter(torch.empty(stack, in_dim, out_dim).uniform_(-bound, bound))
        self.bias_SH = nn.Parameter(torch.empty(stack, out_dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x_SBD: Tensor) -> Tensor:
        return linear(x_SBD, self.weight_SDH, self.bias_SH)


class StackedLayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) of S networks, each with a scale g and a shift b of its own.

    y = g (x - mean) / sqrt(variance + 1e-5) + b, with mean and variance over the H numbers of one row: the result depends on
    no other row and no rank. 1e-5 is torch's; g starts at 1 and b at 0.

    Args:
        stack: S. dim: H.
    Shapes: x_SBH -> y_SBH.
    """

    def __init__(self, stack: int, dim: int) -> None:
        super().__init__()
        self.shape = (dim,)
        self.scale_SH = nn.Parameter(torch.ones(stack, dim))
        self.shift_SH = nn.Parameter(torch.zeros(stack, dim))

    def forward(self, x_SBH: Tensor) -> Tensor:
        return F.layer_norm(x_SBH, self.shape) * self.scale_SH.unsqueeze(1) + self.shift_SH.unsqueeze(1)


class StackedMLP(nn.Module):
    """S multi-layer perceptrons. A layer is, in this order: linear, norm, activation, dropout.

    Args:
        stack: S. in_dim: D. widths: of the layers, the last is H. dropout: after each layer.
        readers: how many of the networks read each input, in order; None: one each, or all the only one.
        activation, norm: of every layer, the last one too; see `ExpertLayers`.
    Shapes: x_UBD -> y_SBH.
    """

    def __init__(
        self, stack: int, in_dim: int, widths: Sequence[int], dropout: float = 0.0, readers: Sequence[int] | None = None,
        activation: Activation = "relu", norm: Norm = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        dims = [in_dim, *widths]
        self.layers = nn.ModuleList(StackedLinear(stack, i, o) for i, o in zip(dims, dims[1:], strict=False))
        self.norms = nn.ModuleList(StackedLayerNorm(stack, width) for width in widths if norm == "layer")
        self.activation = ACTIVATIONS[activation]
        self.fused = activation == "relu" and norm == "none"
        self.dropout = nn.Dropout(dropout)
        # Inputs with equally many readers that follow each other: (how many inputs, how many networks).
        runs = [(count, len(list(inputs))) for count, inputs in groupby(readers or [])]
        self.runs = [(inputs, inputs * count) for count, inputs in runs]

    def forward(self, x_UBD: Tensor) -> Tensor:
        runs = self.runs
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, StackedLinear)
            assert layer.bias_SH is not None
            if self.fused:
                y_SBH = rectified(x_UBD, layer.weight_SDH, layer.bias_SH, runs)
            else:
                y_SBH = linear(x_UBD, layer.weight_SDH, layer.bias_SH, runs)
                y_SBH = self.activation(self.norms[index](y_SBH) if self.norms else y_SBH)
            x_UBD, runs = self.dropout(y_SBH), []
        return x_UBD


class StackedGate(StackedLinear):
    """S gates before their softmax: a linear layer over the experts, above hidden layers with ReLU where there are any.

    Args:
        stack: S. in_dim: D. num_experts: E. bias: of the linear layer; hidden layers always have one. layers: their widths.
    Shapes: x_SBD, or x_1BD for all -> score_SBE.
    """

    def __init__(self, stack: int, in_dim: int, num_experts: int, bias: bool, layers: Sequence[int]) -> None:
        super().__init__(stack, layers[-1] if layers else in_dim, num_experts, bias)
        self.hidden = StackedMLP(stack, in_dim, layers)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return super().forward(self.hidden(x_SBD))


class ExpertLayers(BaseModel):
    """`model.fusion.experts`: the layers of a fusion's experts or, in one without experts, of its networks.

    Batch normalisation is not among the norms: its statistics are those of the rows that a rank has, so the weights would
    depend on the number of ranks.

    Attributes:
        activation: gelu is the exact one, x Phi(x) (Hendrycks & Gimpel 2016); silu is x sigmoid(x).
        norm: "layer": StackedLayerNorm before the activation.
        dropout: after each activation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    activation: Activation = "relu"
    norm: Norm = "none"
    dropout: float = Field(0.0, ge=0, lt=1)

    def stack(
        self, networks: int, in_dim: int, widths: Sequence[int], readers: Sequence[int] | None = None
    ) -> StackedMLP:
        """Networks of such layers; arguments as those of StackedMLP."""
        return StackedMLP(networks, in_dim, widths, self.dropout, readers, self.activation, self.norm)


class GateLayers(BaseModel):
    """`model.fusion.gate`: what a fusion's gates are below their softmax.

    The papers of MMoE, PLE and AdaTT have softmax(W x), the default. Published code often has more: that of AdaTT a bias,
    DeepCTR-Torch hidden layers with ReLU.

    Attributes:
        bias: of the last layer. layers: widths of hidden layers with ReLU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    bias: bool = False
    layers: tuple[Width, ...] = Field((), max_length=64)

    def stack(self, gates: int, in_dim: int, num_experts: int) -> StackedGate:
        """Such gates; arguments as those of StackedGate."""
        return StackedGate(gates, in_dim, num_experts, self.bias, self.layers)


PLAIN_EXPERTS, LINEAR_GATES = ExpertLayers(), GateLayers()


def linear(x_UBD: Tensor, weight_SDH: Tensor, bias_SH: Tensor | None, runs: Sequence[tuple[int, int]] = ()) -> Tensor:
    """y_SBH = x W + b, where each input is read by S / U networks that follow each other: one product an input.

    Args:
        runs: how many inputs and how many networks, run by run, where their ratio changes; () where it does not.
    """
    if len(runs) > 1:
        assert bias_SH is not None
        return _by_run(linear, x_UBD, weight_SDH, bias_SH, runs)
    inputs, out_dim = len(x_UBD), weight_SDH.shape[2]
    weight_UDN = _concat_weights(weight_SDH, inputs)
    if inputs == 1 and torch.compiler.is_exporting():  # what reads the program has a faster kernel for it
        bias_N = None if bias_SH is None else bias_SH.flatten()
        y_UBN = F.linear(x_UBD[0], weight_UDN[0].t(), bias_N).unsqueeze(0)
    elif bias_SH is None:
        y_UBN = torch.bmm(x_UBD, weight_UDN)
    else:
        y_UBN = torch.baddbmm(bias_SH.reshape(inputs, 1, -1), x_UBD, weight_UDN)
    return y_UBN.unflatten(2, (-1, out_dim)).transpose(1, 2).flatten(0, 1)


def rectified(x_UBD: Tensor, weight_SDH: Tensor, bias_SH: Tensor, runs: Sequence[tuple[int, int]] = ()) -> Tensor:
    """y_SBH = relu(x W + b); arguments as those of `linear`."""
    if len(runs) > 1:
        return _by_run(rectified, x_UBD, weight_SDH, bias_SH, runs)
    if torch.compiler.is_compiling():  # the compiler fuses relu with the product
        return torch.relu(linear(x_UBD, weight_SDH, bias_SH))
    device = x_UBD.device.type
    if torch.is_autocast_enabled(device):  # autocast does not reach inside a custom autograd function
        dtype = torch.get_autocast_dtype(device)
        x_UBD, weight_SDH, bias_SH = x_UBD.to(dtype), weight_SDH.to(dtype), bias_SH.to(dtype)
    return _Rectified.apply(x_UBD, weight_SDH, bias_SH)


def _by_run(
    layer: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_UBD: Tensor,
    weight_SDH: Tensor,
    bias_SH: Tensor,
    runs: Sequence[tuple[int, int]],
) -> Tensor:
    """y_SBH of `linear` or `rectified`, run by run; rows are contiguous, as mixtures need them."""
    inputs, networks = (list(sizes) for sizes in zip(*runs, strict=True))
    parts = zip(x_UBD.split(inputs), weight_SDH.split(networks), bias_SH.split(networks), strict=True)
    y_BSH = [layer(*part).transpose(0, 1) for part in parts if len(part[1])]
    return torch.cat(y_BSH, 1).transpose(0, 1)


for name in ("linear", "rectified", "_packed"):
    torch.fx.wrap(name)  # one node each for TorchRec's pipelined loop, which traces the forward


class _Rectified(torch.autograd.Function):
    """relu(x W + b), where each input is read by C networks that follow each other: one product an input.

    A custom derivative lets relu, which visits every element anyway, change the memory layout in both directions: products
    need the rows of an input contiguous, mixtures all experts of a row.
    """

    @staticmethod
    def forward(ctx: Any, x_UBD: Tensor, weight_SDH: Tensor, bias_SH: Tensor) -> Tensor:
        inputs, rows, _ = x_UBD.shape
        x_UBD, weight_UDN, bias_UN = _packed(x_UBD), _concat_weights(weight_SDH, inputs), bias_SH.reshape(inputs, -1)
        shape = (inputs, rows, len(weight_SDH) // inputs, weight_SDH.shape[2])
        if inputs == 1:
            y_UBCH = _product(x_UBD[0], weight_UDN[0], bias_UN[0]).view(shape)
        elif inputs == len(weight_SDH):
            y_UBCH = torch.baddbmm(bias_UN.unsqueeze(1), x_UBD, weight_UDN).relu_().view(shape)
        else:
            z_UBN = torch.baddbmm(bias_UN.unsqueeze(1), x_UBD, weight_UDN)
            y_UBCH = z_UBN.new_empty(rows, inputs, *shape[2:]).transpose(0, 1)
            torch.clamp_min(z_UBN.view(shape), 0, out=y_UBCH)
        ctx.save_for_backward(x_UBD, weight_SDH, y_UBCH)
        return y_UBCH.transpose(1, 2).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_SBH: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a derivative of the derivative is wanted
            return _rectified_gradients(grad_SBH, *ctx.saved_tensors)
        x_UBD, weight_SDH, y_UBCH = ctx.saved_tensors
        grad_UBCH = grad_SBH.unflatten(0, y_UBCH.shape[::2]).transpose(1, 2)
        z_UBCH = torch.empty_like(y_UBCH, memory_format=torch.contiguous_format)
        torch.ops.aten.threshold_backward.grad_input(grad_UBCH, y_UBCH, 0, grad_input=z_UBCH)
        z_UBN, x, weight = z_UBCH.flatten(2), None, None
        if ctx.needs_input_grad[0]:
            weight_UND = _concat_weights(weight_SDH, len(x_UBD)).transpose(1, 2)
            x = torch.bmm(z_UBN, weight_UND) if len(x_UBD) > 1 else _product(z_UBN[0], weight_UND[0]).unsqueeze(0)
        if ctx.needs_input_grad[1]:
            weight_UDN = torch.bmm(x_UBD.transpose(1, 2), z_UBN)
            weight = weight_UDN.unflatten(2, y_UBCH.shape[2:]).transpose(1, 2).flatten(0, 1)
        return x, weight, z_UBN.sum(1).view(len(weight_SDH), -1)


def _rectified_gradients(
    grad_SBH: Tensor, x_UBD: Tensor, weight_SDH: Tensor, y_UBCH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, W and b in relu(x W + b) by operators that have gradients themselves."""
    grad_UBCH = grad_SBH.unflatten(0, y_UBCH.shape[::2]).transpose(1, 2)
    z_UBN = (grad_UBCH * (y_UBCH > 0)).flatten(2)
    x = torch.bmm(z_UBN, _concat_weights(weight_SDH, len(x_UBD)).transpose(1, 2))
    weight_UDN = torch.bmm(x_UBD.transpose(1, 2), z_UBN)
    weight = weight_UDN.unflatten(2, y_UBCH.shape[2:]).transpose(1, 2).flatten(0, 1)
    return x, weight, z_UBN.sum(1).view(len(weight_SDH), -1)


def _product(x_BD: Tensor, weight_DN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W, or relu(x W + b)."""
    if ONEDNN and x_BD.device.type == "cpu" and x_BD.dtype == torch.float32:
        # oneDNN's kernels take a sixth less time than those behind torch.mm. Their fused relu turns NaN into 0, which would
        # hide a broken input. They take a bias for contiguous, and of one that is not read what lies behind its first number.
        y_BN = onednn_linear(x_BD, weight_DN.t(), None if bias_N is None else bias_N.contiguous())
        return y_BN if bias_N is None else y_BN.relu_()
    return x_BD @ weight_DN if bias_N is None else torch.addmm(bias_N, x_BD, weight_DN).relu_()


def _concat_weights(weight_SDH: Tensor, inputs: int) -> Tensor:
    """weight_UDN: the weights of the networks that read the same input, concatenated to one matrix."""
    in_dim, out_dim = weight_SDH.shape[1:]
    return weight_SDH.reshape(inputs, -1, in_dim, out_dim).transpose(1, 2).reshape(inputs, in_dim, -1)


def _packed(x: Tensor) -> Tensor:
    """Contiguous where each product would copy it otherwise: in half precision on a CPU."""
    return x.contiguous() if x.device.type == "cpu" and x.dtype.itemsize == 2 else x


def mix(gate_TBE: Tensor, expert_EBD: Tensor) -> Tensor:
    """Each user's weighted sum of the experts, row by row: h_TBD."""
    return torch.bmm(gate_TBE.transpose(0, 1), _packed(expert_EBD.transpose(0, 1))).transpose(0, 1)
