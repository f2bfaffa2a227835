"""The plain versions that towers.py times are the same maths as the fusions."""

import pytest
import torch
from matrix_products import Product, backward, floor
from tower_cases import CASES, Sizes
from towers import differences

SMALL = {"in_dim": 12, "wide": 8, "narrow": 6, "tower": 4, "fields": 3}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("tasks", "rows"), [(2, 5), (4, 3)])
def test_plain_and_ours_give_the_same_outputs_and_gradients(name, tasks, rows):
    torch.manual_seed(tasks)
    found = differences(name, Sizes(tasks, rows, **SMALL))
    assert all(size < 1e-10 for size in found.values()), found


def test_backward_products_are_those_that_autograd_takes():
    shapes = set()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.bmm.default:
                shapes.add(Product(args[0].shape[0], args[0].shape[1], args[0].shape[2], args[1].shape[2]))
            return function(*args, **(kwargs or {}))

    a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 5, requires_grad=True)
    product = Product(2, 3, 4, 5)
    with Record():
        torch.bmm(a, b).sum().backward()
    assert shapes == {product, *backward(product)}


def test_every_layout_of_the_floor_runs():
    floor([Product(1, 3, 4, 5), Product(2, 3, 4, 5), Product(70, 2, 3, 4)], torch.float32, "cpu")()
