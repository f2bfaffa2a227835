"""How a module is compared with its reference: sizes and parameters drawn at random, everything in float64."""

# Shapes: B rows, D width, T tasks.

from collections.abc import Callable, Mapping
from types import SimpleNamespace as Sizes

import torch
from hypothesis import strategies as st
from references.layers import compared
from torch import Tensor, nn
from torch.testing import assert_close

TOLERANCE = 1e-10
widths = st.lists(st.integers(1, 5), min_size=1, max_size=2)


def drawn_sizes(**further: st.SearchStrategy) -> st.SearchStrategy[Sizes]:
    """B, D, T and seed, with whatever else a module needs."""
    common = {"B": st.integers(1, 5), "D": st.integers(1, 6), "T": st.integers(1, 4), "seed": st.integers(0, 10**6)}
    return st.fixed_dictionaries(common | further).map(lambda drawn: Sizes(**drawn))


def close(actual: Tensor, expected: Tensor, message: str = "") -> None:
    assert_close(
        actual, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{message}: {text}" if message else text
    )


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """The module in float64 with every parameter drawn anew, so large that gates are far from uniform."""
    module = module.double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return module


def rows(size: Sizes, *shape: int) -> Tensor:
    """B rows of normal numbers, of D each unless `shape` says otherwise."""
    rng = torch.Generator().manual_seed(size.seed + 1)
    return torch.randn(size.B, *(shape or (size.D,)), generator=rng, dtype=torch.float64)


def load(module: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
    """The module in float64 with these parameters, which must be all it has."""
    module = module.double()
    assert {name for name, _ in module.named_parameters()} == set(params)
    module.load_state_dict(dict(params), strict=True)
    return module


def check(module: nn.Module, reference: Callable[..., Tensor], x: Tensor) -> None:
    """Equal outputs, and equal gradients of a random sum of them with respect to the input and every parameter.

    Args:
        reference: a module of references/, which also has gates to compare; or a function (params, x) -> output.
    """
    if isinstance(reference, nn.Module):
        for what, pair in compared(module, reference, x).items():
            close(*pair, what)
        if hasattr(module, "gates"):
            check_gates(module.gates(x), reference.gates(x))
        return
    x = x.requires_grad_()
    params = dict(module.named_parameters())
    same(module(x), reference(params, x), {"x": x, **params})


def same(actual: Tensor, expected: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Equal outputs, and equal gradients of a random sum of them with respect to all inputs, which have names."""
    close(actual, expected, "forward")
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((h * probe).sum(), list(inputs.values()), materialize_grads=True)
        for h in (actual, expected)
    ]
    for name, real, loop in zip(inputs, *gradients, strict=True):
        close(real, loop, f"gradient of {name}")


def check_gates(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for level, (real, loop) in enumerate(zip(actual, expected, strict=True)):
        close(real, loop, f"gates of level {level}")
