"""A dense program by other operators, of which AOTInductor makes faster code: the same numbers up to rounding.

Inductor takes MKL for products in float32, which on AMD's processors runs at half the speed of oneDNN; and it calls a kernel
for the mixtures of experts, where it would fuse a sum with the gates. 512 rows of adatt on census: 2.5 ms without, 1.3 with.
"""

# Shapes: B rows, U networks, D and N widths in and out, O outputs, E experts; E and D of inputs as in pipeline.serving.program.

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from models.torch_compat import onednn_linear

aten = torch.ops.aten
PRODUCTS = (aten.bmm.default, aten.baddbmm.default)
LARGE = 4096  # weights of a network from which oneDNN gains more than its call costs
FEW = 16  # experts and outputs of a mixture up to which a sum for each output is faster than a product


class Lowered(nn.Module):
    """A program with its products replaced; what depends on weights alone is computed once, here.

    Call Args: embedding_BE, dense_BD.
    Returns: logit_BT.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        graph = program.module(check_guards=False)
        self.graph = [graph]  # in a list: its weights are no longer this module's
        self.varying: set[Node] = set()
        self.fixed: dict[Node, Any] = {}
        fixed = Interpreter(graph, garbage_collect_values=False)
        for node in graph.graph.nodes:
            if node.op == "placeholder" or self.varying.intersection(node.all_input_nodes):
                self.varying.add(node)
                self._take(node, fixed.env)
            else:
                fixed.env[node] = fixed.run_node(node)

    def _take(self, node: Node, values: dict[Node, Any]) -> None:
        """Keeps what a node reads that does not vary: tensors as buffers, of large products one for each network."""
        reads = [read for read in node.all_input_nodes if read in values]
        if (
            node.target in PRODUCTS
            and not node.kwargs
            and reads == [*node.args[:-2], node.args[-1]]  # all but the factor x
        ):
            weight_UDN, bias = values[reads[-1]], [values[read] for read in reads[:-1]]
            if weight_UDN.dtype == torch.float32 and weight_UDN[0].numel() >= LARGE:
                self._keep(f"{node.name}_weight", [weight_DN.t() for weight_DN in weight_UDN])
                for bias_U1N in bias:
                    self._keep(f"{node.name}_bias", list(bias_U1N.expand(len(weight_UDN), 1, -1)[:, 0]))
                return
        for read in reads:
            if read not in self.fixed:
                self.fixed[read] = value = values[read]
                if isinstance(value, Tensor):
                    self._keep(read.name, [value])

    def _keep(self, name: str, tensors: list[Tensor]) -> None:
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"{name}_{number}", tensor.detach().clone(memory_format=torch.contiguous_format))

    def kept(self, name: str, number: int = 0) -> Tensor | None:
        """A buffer of `_keep`."""
        return getattr(self, f"{name}_{number}", None)

    def forward(self, embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:  # noqa: D102
        known = {n: self.kept(n.name) if isinstance(value, Tensor) else value for n, value in self.fixed.items()}
        found = _Lowering(self).run(embedding_BE, dense_BD, initial_env=known)
        logit_BT: Tensor = found[0] if isinstance(found, tuple) else found
        return logit_BT


class _Lowering(Interpreter):
    """Runs a program's graph, with other operators in the place of its products."""

    def __init__(self, lowered: Lowered) -> None:
        super().__init__(lowered.graph[0], garbage_collect_values=False)
        self.lowered = lowered

    def run_node(self, n: Node) -> Any:
        """The value of a node; None of one that only others that do not vary read."""
        if n not in self.lowered.varying and n.op != "output":
            return None
        if n.target is aten.linear.default and self.lowered.varying.intersection(n.all_input_nodes) == {
            n.all_input_nodes[0]
        }:
            (x, weight_ND, *bias), _ = self.fetch_args_kwargs_from_env(n)
            return onednn_linear(x, weight_ND, bias[0] if bias else None)
        if n.target in PRODUCTS and self.lowered.kept(f"{n.name}_weight") is not None:
            return self._by_network(n)
        if n.target is aten.bmm.default and (mixture := self._mixture(n)) is not None:
            return mixture
        return super().run_node(n)

    def _by_network(self, n: Node) -> Tensor:
        """y_UBN = x W + b."""
        x_UBD = self.env[n.all_input_nodes[-2]]
        parts = []
        for u in range(len(x_UBD)):
            weight_ND, bias_N = (self.lowered.kept(f"{n.name}_{what}", u) for what in ("weight", "bias"))
            assert weight_ND is not None
            parts.append(onednn_linear(x_UBD[u].contiguous(), weight_ND, bias_N))
        return torch.stack(parts)

    def _mixture(self, n: Node) -> Tensor | None:
        """y_BON of weight_BOE and expert_BEN as a sum, where there is one a row and few experts."""
        weight, expert = n.all_input_nodes[0], n.all_input_nodes[-1]
        if not self.lowered.varying.issuperset([weight, expert]):
            return None
        rows, outputs, experts = weight.meta["val"].shape
        if isinstance(rows, int) or not isinstance(outputs, int) or not isinstance(experts, int):
            return None
        if max(outputs, experts) > FEW:
            return None
        weight_BOE, expert_BEN = self.env[weight], self.env[expert]
        return torch.stack([(weight_BE.unsqueeze(2) * expert_BEN).sum(1) for weight_BE in weight_BOE.unbind(1)], 1)
