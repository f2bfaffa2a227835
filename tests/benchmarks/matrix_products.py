"""The floor: matrix products and nothing else.

Each product y = a b comes with both of its backward products, g b' and a' g, on contiguous operands and into memory
allocated beforehand. For each of the three the fastest is taken of: one torch.bmm, a torch.mm each, or on CPU a call of oneDNN
each; operands stored as they are, or transposed.
"""

# Shapes: N products of (R, K) and (K, C).

import itertools
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

TRIAL = 2e8  # multiplications of a trial on CPU, on which time does not permit them all


class Product(NamedTuple):
    count: int  # N
    rows: int  # R
    inner: int  # K
    outer: int  # C


def seconds(run: Callable[[], object], times: int, device: str) -> float:
    """Mean of several runs: between events on a GPU, and on one thread of a CPU without the time that others take from it."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / times
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(times):
        run()
    return (clock() - begin) / times


class Operands(NamedTuple):
    """Of out_NRC = a_NRK b_NKC, perhaps views of transposed memory."""

    a_NRK: Tensor
    b_NKC: Tensor
    out_NRC: Tensor
    way: str

    def run(self) -> None:
        if self.way == "bmm":
            torch.bmm(self.a_NRK, self.b_NKC, out=self.out_NRC)
            return
        for a_RK, b_KC, out_RC in zip(self.a_NRK, self.b_NKC, self.out_NRC, strict=True):
            if self.way == "mm":
                torch.mm(a_RK, b_KC, out=out_RC)
            else:
                torch.ops.mkldnn._linear_pointwise(a_RK, b_KC.t(), None, "none", [], "")


Layout = tuple[bool, bool, str]  # whether a and b are stored transposed, and which way to take


def operands(product: Product, layout: Layout, dtype: torch.dtype, device: str) -> Operands:
    count, rows, inner, outer = product

    def stored(height: int, width: int, transposed: bool) -> Tensor:
        if transposed:
            return torch.randn(count, width, height, device=device).to(dtype).transpose(1, 2)
        return torch.randn(count, height, width, device=device).to(dtype)

    out_NRC = torch.zeros(count, rows, outer, dtype=dtype, device=device)
    return Operands(stored(rows, inner, layout[0]), stored(inner, outer, layout[1]), out_NRC, layout[2])


@cache
def fastest(product: Product, dtype: torch.dtype, device: str, tf32: bool) -> Layout:
    """The layout that takes the least time."""
    count, rows, inner, outer = product
    onednn = device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    ways = ["bmm", *(["mm", *(["onednn"] if onednn else [])] if count <= 64 else [])]
    if device == "cpu":
        count = min(count, max(1, round(TRIAL / (rows * inner * outer))))
    trial = Product(count, rows, inner, outer)
    best = {}
    for layout in itertools.product((False, True), (False, True), ways):
        made = operands(trial, layout, dtype, device)
        made.run()
        best[layout] = min(seconds(made.run, 1, device) for _ in range(3))
    return min(best, key=best.__getitem__)


def backward(product: Product) -> Iterator[Product]:
    """g b' and a' g."""
    count, rows, inner, outer = product
    yield Product(count, rows, outer, inner)
    yield Product(count, inner, rows, outer)


def floor(products: list[Product], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """What runs them all, forward and then backward."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    every = [*products, *(back for product in reversed(products) for back in backward(product))]
    made = [operands(product, fastest(product, dtype, device, tf32), dtype, device) for product in every]

    def run() -> None:
        for each in made:
            each.run()

    return run
