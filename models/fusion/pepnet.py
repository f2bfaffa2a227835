"""Networks personalised by prior information (PEPNet; Chang et al., KDD 2023, arXiv 2302.01115)."""

# Shapes: B rows, T tasks, L hidden layers, D width in, P columns of the priors or of the domains, I and O widths of what a gate
# unit reads and gives, H width of a hidden layer.

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from features.errors import UserError
from models.fusion.fusion import Fusion, GateNames
from models.layers import StackedMLP, Widths


class GateUnit(nn.Module):
    """Gate NU: 2 sigmoid(relu(x W + b) W' + b'), in (0, 2). W' and b' start at 0: every gate is 1 before training.

    Args:
        in_dim: I. hidden: width between W and W'. out_dim: O.
    Shapes: x_BI -> gate_BO.
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(in_dim, hidden), nn.Linear(hidden, out_dim)
        for parameter in self.excite.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BI: Tensor) -> Tensor:
        return 2 * self.excite(torch.relu(self.squeeze(x_BI))).sigmoid()


class PEPNet(Fusion):
    """A network a task whose hidden units, and whose input, are scaled by gates on what is known of user, item and domain.

    By the paper's section on its model (equations as a public summary prints them; the paper itself, and with it their numbers,
    was not reachable here), with sg for stop-gradient, F_d the domains' features and F_u, F_i, … the priors':
    - Gate NU: x' = relu(x W + b), delta = gamma sigmoid(x' W' + b'), gamma = 2.
    - EPNet: O_ep = delta_domain * E, delta_domain = GateNU([E(F_d) ; sg(E)]).
    - PPNet: O_prior = [E(F_u) ; E(F_i) ; …], delta_task = GateNU([O_prior ; sg(O_ep)]), in every layer O_pp = delta_task * H,
      and the next layer's H = f(O_pp W + b).

    Chosen here: E is the whole input, numbers included, and priors and domains are columns of it, before EPNet scales them.
    Each hidden layer has a gate unit of its own, which gives the gates of all tasks. A layer is scaled after its ReLU, the last
    one too, and the input by EPNet only. W' starts at 0, so that training begins with plain networks.

    Args:
        in_dim: D. num_tasks: T. columns: of each feature in x_BD.
        widths: of each task's hidden layers, the last is D out.
        priors: features of user, item or author (in a config by name); None: gates read sg(O_ep) alone.
        domains: features of the scene, such as device or page (in a config by name); None: without EPNet, O_ep = E.
        hidden: width inside a gate unit.
    Shapes: x_BD -> h_BTD.
    Raises:
        UserError: a feature that is named twice.
    """

    reads_columns = True
    feature_layers = ("epnet", "ppnet")
    field_arguments = ("priors", "domains")
    prior_P: Tensor
    domain_P: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, columns: Sequence[Sequence[int]], widths: Widths,
        priors: Sequence[int] | None = None, domains: Sequence[int] | None = None,
        hidden: Annotated[int, Field(ge=1)] = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, fields in (("priors", priors), ("domains", domains)):
            if len(set(fields or ())) < len(fields or ()):
                raise UserError(f"model.fusion.{name}: names a feature twice")
        self.num_tasks, self.out_dim = num_tasks, widths[-1]
        prior_P, domain_P = ([c for f in fields or () for c in columns[f]] for fields in (priors, domains))
        self.register_buffer("prior_P", torch.tensor(prior_P, dtype=torch.int64), persistent=False)
        self.register_buffer("domain_P", torch.tensor(domain_P, dtype=torch.int64), persistent=False)
        self.epnet = GateUnit(len(domain_P) + in_dim, hidden, in_dim) if domains else None
        self.ppnet = nn.ModuleList(GateUnit(len(prior_P) + in_dim, hidden, num_tasks * w) for w in widths)
        dims = [in_dim, *widths]
        self.networks = nn.ModuleList(StackedMLP(num_tasks, i, [o]) for i, o in zip(dims, widths, strict=False))

    def forward(self, x_BD: Tensor) -> Tensor:
        e_BD, gates_L = self._gated(x_BD)
        h_TBH = e_BD.unsqueeze(0)
        for network, gate_BTH in zip(self.networks, gates_L, strict=True):
            h_TBH = network(h_TBH) * gate_BTH.transpose(0, 1)
        return h_TBH.transpose(0, 1)

    def _gated(self, x_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """O_ep, e_BD, and of each hidden layer gate_BTH."""
        e_BD = x_BD
        if self.epnet is not None:
            e_BD = x_BD * self.epnet(torch.cat([x_BD.index_select(1, self.domain_P), x_BD.detach()], 1))
        prior_BI = torch.cat([x_BD.index_select(1, self.prior_P), e_BD.detach()], 1)
        return e_BD, [unit(prior_BI).unflatten(1, (self.num_tasks, -1)) for unit in self.ppnet]

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """One level: the mean of each task's gates over the units of each hidden layer, weight_BTL, in (0, 2)."""
        return [torch.stack([gate_BTH.mean(2) for gate_BTH in self._gated(x_BD)[1]], 2)]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Tasks scale their hidden layers."""
        return [GateNames(list(tasks), [f"layer {index + 1}" for index in range(len(self.ppnet))])]
