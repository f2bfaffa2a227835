"""Operations that an expert's block chooses from (AutoMTL, section 3.3.2 and table 1), of all experts at once."""

# Shapes: S experts, B rows, H width of every block's output, D width in, C sizes of an operation, K hidden columns or places of
# the widest kernel.

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from features.errors import UserError
from models.layers import StackedLinear, linear, rectified


class Operation(nn.Module):
    """A kind of operation in C sizes, for S experts: (stack, width, sizes).

    Attributes:
        sized: a name has a size after an underscore, a whole number from 1.
    """

    sized: ClassVar[bool] = True

    @classmethod
    def check_size(cls, size: str) -> None:
        """Raises UserError for the text after the underscore of a name that is no size of this kind."""
        if not cls.sized and size:
            raise UserError(f"it has no size: leave _{size} out")
        if cls.sized and not is_size(size):
            raise UserError("it needs a size after an underscore, a whole number from 1 to 65536")

    def one(self, x_SBH: Tensor, size: int, experts: Sequence[int] | None = None) -> Tensor:
        """y_SBH of one size, by its index.

        Args:
            x_SBH: inputs, or x_1BH of all.
            experts: which of them these inputs are of; None: all.
        """
        raise NotImplementedError

    def mixture(self, x_SBH: Tensor, weight_SC: Tensor) -> Tensor:
        """y_SBH, the weighted sum of the sizes' outputs. Subclasses that share products between sizes override it."""
        parts = [weight_SC[:, c, None, None] * self.one(x_SBH, c) for c in range(weight_SC.shape[1])]
        return torch.stack(parts).sum(0)


class MLP(Operation):
    """W2 relu(W1 x + b1) + b2 in several hidden widths.

    The paper leaves open how outputs of unlike width are mixed: W2 projects each back to H, and is one for all widths. An MLP
    of K columns is the first K of the widest one (`nested`), so all widths are one product; or each has columns of its own,
    which costs the sum of all widths in place of the largest.

    Args:
        stack: S. width: H. sizes: hidden widths. nested: see above. in_dim: D; None: H.
    """

    owner_CK: Tensor

    def __init__(
        self, stack: int, width: int, sizes: Sequence[str], nested: bool = True, in_dim: int | None = None
    ) -> None:
        super().__init__()
        widths = [int(size) for size in sizes]
        ends = widths if nested else [sum(widths[: c + 1]) for c in range(len(widths))]
        self.columns = [slice(0 if nested else end - width, end) for width, end in zip(widths, ends, strict=True)]
        owner_CK = torch.zeros(len(widths), max(ends))
        for c, columns in enumerate(self.columns):
            owner_CK[c, columns] = 1
        self.register_buffer("owner_CK", owner_CK, persistent=False)
        self.hidden = StackedLinear(stack, in_dim or width, max(ends))
        self.out = StackedLinear(stack, max(ends), width)

    def one(self, x_SBH: Tensor, size: int, experts: Sequence[int] | None = None) -> Tensor:
        k = self.columns[size]
        assert self.hidden.bias_SH is not None
        assert self.out.bias_SH is not None
        first_SDK, bias_SK = of(self.hidden.weight_SDH, experts), of(self.hidden.bias_SH, experts)
        second_SKH, bias_SH = of(self.out.weight_SDH, experts), of(self.out.bias_SH, experts)
        # oneDNN takes a hundred times as long for weights that are not contiguous.
        h_SBK = rectified(x_SBH, first_SDK[:, :, k].contiguous(), bias_SK[:, k])
        return linear(h_SBK, second_SKH[:, k].contiguous(), bias_SH)

    def mixture(self, x_SBH: Tensor, weight_SC: Tensor) -> Tensor:
        first_SDK, bias_SK, second_SKH, bias_SH = self.parameters()
        # The weights scale rows of W2 in place of columns of the hidden layer, of which there are as many as rows.
        share_SK = weight_SC @ self.owner_CK
        total_S1 = weight_SC.sum(1, keepdim=True)
        h_SBK = rectified(x_SBH, first_SDK, bias_SK)
        return linear(h_SBK, share_SK.unsqueeze(2) * second_SKH, total_S1 * bias_SH)


class Gating(Operation):
    """x * sigmoid(W x + b), a gate for each number (GateNet, Huang et al., arXiv 2007.03519, section 3.2: the hidden gate)."""

    sized = False

    def __init__(self, stack: int, width: int, sizes: Sequence[str]) -> None:  # noqa: ARG002
        super().__init__()
        self.gate = StackedLinear(stack, width, width)

    def one(self, x_SBH: Tensor, size: int, experts: Sequence[int] | None = None) -> Tensor:  # noqa: ARG002
        weight_SHH, bias_SH = (of(p, experts) for p in self.gate.parameters())
        return x_SBH * linear(x_SBH, weight_SHH, bias_SH).sigmoid()


class Convolution(Operation):
    """relu(w * x + b): a convolution along the H numbers with one channel, padded with zeros to keep H.

    The paper gives kernel sizes alone. It is computed as a product with a banded H x H matrix, on a CPU a third faster than a
    convolution of one channel an expert.

    Args:
        stack: S. width: H. sizes: of kernels, odd.
    """

    place_HH: Tensor
    inside_CK: Tensor

    def __init__(self, stack: int, width: int, sizes: Sequence[str]) -> None:
        super().__init__()
        self.sizes = [int(size) for size in sizes]
        widest = max(self.sizes)
        bound_C1 = torch.tensor([[1 / math.sqrt(size)] for size in self.sizes])  # as nn.Conv1d does
        self.kernel_SCK = nn.Parameter(torch.empty(stack, len(sizes), widest).uniform_(-1, 1) * bound_C1)
        self.bias_SC = nn.Parameter(torch.empty(stack, len(sizes)).uniform_(-1, 1) * bound_C1[:, 0])
        half = widest // 2
        inside_CK = (torch.arange(widest) - half).abs() <= torch.tensor(self.sizes).unsqueeze(1) // 2
        self.register_buffer("inside_CK", inside_CK, persistent=False)
        # Of input h and output j, the place in the kernel, or `widest` beyond it.
        place_HH = torch.arange(width).unsqueeze(1) - torch.arange(width) + half
        self.register_buffer(
            "place_HH", place_HH.where((place_HH >= 0) & (place_HH < widest), widest), persistent=False
        )

    @classmethod
    def check_size(cls, size: str) -> None:
        """As of all; an even kernel has no middle."""
        super().check_size(size)
        if int(size) % 2 == 0:
            raise UserError("a kernel needs an odd size")

    def one(self, x_SBH: Tensor, size: int, experts: Sequence[int] | None = None) -> Tensor:
        band_SHH, bias_S1 = self._bands(experts)[:, size], of(self.bias_SC, experts)[:, size, None]
        return rectified(x_SBH, band_SHH.contiguous(), bias_S1.expand(-1, band_SHH.shape[2]))

    def mixture(self, x_SBH: Tensor, weight_SC: Tensor) -> Tensor:
        band_SCHH = self._bands(None)
        width = band_SCHH.shape[3]
        bias_SN = self.bias_SC.repeat_interleave(width, 1)
        y_SBN = rectified(x_SBH, band_SCHH.transpose(1, 2).flatten(2), bias_SN)
        return torch.einsum("sbch,sc->sbh", y_SBN.unflatten(2, (-1, width)), weight_SC)

    def _bands(self, experts: Sequence[int] | None) -> Tensor:
        """The matrices band_SCHH, input by output."""
        kernel_SCK = of(self.kernel_SCK, experts) * self.inside_CK
        band_SCN = nn.functional.pad(kernel_SCK, (0, 1)).index_select(2, self.place_HH.flatten())
        return band_SCN.unflatten(2, self.place_HH.shape)


class Skip(Operation):
    """x: an expert has a layer less."""

    sized = False

    def __init__(self, stack: int, width: int, sizes: Sequence[str]) -> None:  # noqa: ARG002
        super().__init__()
        self.stack = stack

    def one(self, x_SBH: Tensor, size: int, experts: Sequence[int] | None = None) -> Tensor:  # noqa: ARG002
        return x_SBH.expand(self.stack if experts is None else len(experts), -1, -1)


for name in ("linear", "rectified"):
    torch.fx.wrap(name)  # as in models.layers: what is wrapped are names of a module

OPERATIONS: dict[str, type[Operation]] = {"gating": Gating, "mlp": MLP, "conv": Convolution, "skip": Skip}


def is_size(text: str) -> bool:
    """Whether it is a whole number from 1 to 65536. Of thousands of digits int() makes an error of its own."""
    return text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 1 << 16


def of(parameter: Tensor, experts: Sequence[int] | None) -> Tensor:
    """The part of a stacked parameter that some experts have; None: all."""
    # The derivative of indexing by a list is slow on a CPU.
    return parameter if experts is None else parameter.index_select(0, torch.tensor(experts, device=parameter.device))
