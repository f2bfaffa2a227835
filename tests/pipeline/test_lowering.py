"""What compiled programs leave as it is: products that only resemble those of networks and mixtures."""

import torch
from torch import Tensor, nn

from pipeline.release.export import lowering
from pipeline.release.export.program import with_rows


class Unlike(nn.Module):
    """A product whose bias varies and whose factors do not, and one of as many outputs as a dot of many fields has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x_UBD", torch.randn(2, 3, 5))
        self.register_buffer("weight_UDN", torch.randn(2, 5, 4))

    def forward(self, embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:
        field_BFW = embedding_BE.view(-1, 20, 3)
        dot_BFF = torch.bmm(field_BFW, field_BFW.transpose(1, 2))
        y_UBN = torch.baddbmm(dense_BD.sum().expand(2, 3, 4), self.x_UBD, self.weight_UDN)
        return dot_BFF.sum((1, 2)).unsqueeze(1) + y_UBN.square().sum()


def test_products_of_another_kind_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(lowering, "LARGE", 1)
    module = Unlike().eval()
    lowered = with_rows(lowering.Lowered(with_rows(module, 60, 3)), 60, 3)
    found = [node.target for node in lowered.graph.nodes]
    assert found.count(torch.ops.aten.bmm.default) == found.count(torch.ops.aten.baddbmm.default) == 1
    given = torch.randn(7, 60), torch.randn(7, 3)
    torch.testing.assert_close(lowered.module()(*given), module(*given))
