"""What towers.py times: references of the same maths as the fusions, and products of the shapes and layouts meant."""

import pytest
import torch
from matrix_products import Operands, Product, backward, floor, operands
from tower_cases import CASES, Sizes
from towers import differences

SMALL = {"in_dim": 12, "wide": 8, "narrow": 6, "tower": 4, "fields": 3}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("tasks", "rows"), [(2, 5), (4, 3)])
def test_plain_and_ours_give_the_same_outputs_and_gradients(name, tasks, rows):
    torch.manual_seed(tasks)
    found = differences(name, Sizes(tasks, rows, **SMALL))
    assert max(found.values()) < 1e-10, found


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


@pytest.mark.parametrize("way", ["bmm", "mm"])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_every_layout_of_the_operands_gives_their_product(way, transposed):
    made = operands(Product(2, 3, 4, 5), (*transposed, way), torch.float32, "cpu")
    made.run()
    torch.testing.assert_close(made.out_NRC, torch.einsum("nrk,nkc->nrc", made.a_NRK, made.b_NKC))


def test_the_floor_runs_every_product_forward_and_backward(monkeypatch):
    products, run = [Product(1, 3, 4, 5), Product(70, 2, 3, 4)], []
    whole = floor(products, torch.float32, "cpu")
    monkeypatch.setattr(Operands, "run", lambda self: run.append((*self.a_NRK.shape, self.b_NKC.shape[2])))
    whole()
    assert run == [*products, *backward(products[1]), *backward(products[0])]
