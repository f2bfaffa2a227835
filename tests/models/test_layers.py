"""Stacks of networks: inputs shared in every way, lower precision, and what is frozen."""

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, close, drawn_sizes, randomised, widths
from references.loops import mlp
from torch import Tensor

from models.layers import StackedMLP, linear, rectified

# Shapes: U inputs, S networks of a stack, B rows, D width.
readers = st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any)
sizes = drawn_sizes(readers=readers)


def inputs(size: Sizes, count: int) -> Tensor:
    rng = torch.Generator().manual_seed(size.seed + 1)
    return torch.randn(count, size.B, size.D, generator=rng, dtype=torch.float64)


def by_loop(source_S: list[int], depth: int):
    """Network s on input source_S[s], row by row."""

    def twin(params, x_UBD):
        outputs = [[mlp(params, "", s, depth, x_D) for x_D in x_UBD[u]] for s, u in enumerate(source_S)]
        return torch.stack([torch.stack(rows) for rows in outputs])

    return twin


@settings(max_examples=examples(60), deadline=None)
@given(sizes, widths)
def test_each_input_goes_to_as_many_networks_as_read_it(size, widths):
    stack = randomised(StackedMLP(sum(size.readers), size.D, widths, readers=size.readers), size.seed)
    source_S = [u for u, count in enumerate(size.readers) for _ in range(count)]
    check(stack, by_loop(source_S, len(widths)), inputs(size, len(size.readers)))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, widths)
def test_a_single_input_goes_to_all_networks(size, widths):
    stack = randomised(StackedMLP(size.T, size.D, widths), size.seed)
    check(stack, by_loop([0] * size.T, len(widths)), inputs(size, 1))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.integers(1, 3), st.integers(1, 3))
def test_what_a_compiler_is_given_equals_what_runs_without_one(size, count, readers):
    rng = torch.Generator().manual_seed(size.seed)
    weight_SDH = torch.randn(count * readers, size.D, 3, generator=rng, dtype=torch.float64)
    bias_SH = torch.randn(count * readers, 3, generator=rng, dtype=torch.float64)
    x_UBD = inputs(size, count)
    close(rectified(x_UBD, weight_SDH, bias_SH), linear(x_UBD, weight_SDH, bias_SH).relu())


def relative(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest distance as a whole: next to 0 a unit may count in one order of summation and not in the other."""
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(one, other, strict=True))


def outputs_and_gradients(network, stack: StackedMLP, x_UBD: Tensor, bf16: bool = False) -> list[Tensor]:
    x_UBD = x_UBD.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y_SBD = network(x_UBD)
    assert y_SBD.dtype == (torch.bfloat16 if bf16 else x_UBD.dtype)
    probe_SBD = torch.randn(y_SBD.shape, generator=torch.Generator().manual_seed(1)).to(y_SBD.dtype)
    return [y_SBD, *torch.autograd.grad(y_SBD, [x_UBD, *stack.parameters()], probe_SBD)]


@pytest.mark.parametrize("readers", [None, [1, 1, 1, 1], [2, 2], [3, 1]])
def test_float32_comes_close_to_float64(readers):
    torch.manual_seed(0)
    stack = StackedMLP(4, 24, [32, 16], readers=readers)
    x_UBD = torch.randn(len(readers or [4]), 64, 24)
    found = outputs_and_gradients(stack, stack, x_UBD)
    assert relative(found, outputs_and_gradients(stack.double(), stack, x_UBD.double())) < 1e-5


@pytest.mark.parametrize("inputs", [1, 2, 4])
def test_autocast_gives_what_it_gives_without_a_derivative_of_our_own(inputs):
    torch.manual_seed(0)
    stack = StackedMLP(4, 24, [32, 16])
    x_UBD = torch.randn(inputs, 64, 24)

    def plain(h_SBD: Tensor) -> Tensor:
        for layer in stack.layers:
            h_SBD = linear(h_SBD, layer.weight_SDH, layer.bias_SH).relu()
        return h_SBD

    found = outputs_and_gradients(stack, stack, x_UBD, bf16=True)
    assert relative(found, outputs_and_gradients(plain, stack, x_UBD, bf16=True)) < 1e-2


def test_frozen_weights_and_inputs_get_no_gradient():
    stack = StackedMLP(3, 4, [5, 2]).requires_grad_(False)
    x_UBD = torch.randn(1, 6, 4, requires_grad=True)
    stack(x_UBD).sum().backward()
    assert x_UBD.grad is not None
    assert all(parameter.grad is None for parameter in stack.parameters())
    stack.requires_grad_(True)
    stack(x_UBD.detach()).sum().backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())


@pytest.mark.parametrize("inputs", [1, 2, 4])
def test_what_is_no_number_stays_none(inputs: int) -> None:
    x_UBD = torch.ones(inputs, 5, 3)
    x_UBD[:, 2, 1] = torch.nan
    y_SBH = StackedMLP(4, 3, [6], readers=None if inputs == 1 else [4 // inputs] * inputs)(x_UBD)
    assert y_SBH[:, 2].isnan().all()
    assert y_SBH[:, [0, 1, 3, 4]].isfinite().all()
