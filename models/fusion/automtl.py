"""AutoMTL: the network that an architecture search found, and the supernet that the search trains."""

# Shapes: B rows, T tasks, D width in, N experts, L blocks of an expert, O candidates of a block, I of the interaction, H width
# of every block's output.

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from features.errors import UserError
from models.automtl.architecture import Architecture, Strengths
from models.automtl.blocks import ChosenBlock, ExpertBlock, InteractionBlock, check_names
from models.automtl.interactions import INTERACTIONS
from models.automtl.operations import OPERATIONS
from models.fusion.fusion import Fusion, GateNames
from models.fusion.tasks import TaskInfo
from models.layers import LINEAR_GATES, GateLayers, Width, mix

Candidates = Annotated[Sequence[str], Field(min_length=1, max_length=1000)]


class AutoMTL(Fusion):
    """What jobs.search found: one interaction, experts of unlike blocks, a gate a task over its experts (AutoMTL, section 3.2).

    Experts that no task has are left out. The gates read what the experts read, as in MMoE.

    Args:
        in_dim: D. num_tasks: T. columns: of each feature in x_BD. architecture: see there.
        tasks: of the model; each is one of the architecture's. gate: layers of the gates.
    Shapes: x_BD -> h_BTD, D out = H.
    Raises:
        UserError: a task that the architecture does not have.
    """

    reads_columns = True
    reads_tasks = True
    feature_layers = ("interaction",)
    hidden_TN: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, columns: Sequence[Sequence[int]], architecture: Architecture,
        tasks: Sequence[TaskInfo], gate: GateLayers = LINEAR_GATES,
    ) -> None:  # fmt: skip
        super().__init__()
        if missing := [task.name for task in tasks if task.name not in architecture.tasks]:
            raise UserError(
                f"model.architecture: has no experts for {missing[0]}, only for {', '.join(architecture.tasks)}. Search on "
                "this dataset, or write experts for it into the file."
            )
        self.out_dim = architecture.width
        chosen = [architecture.tasks[task.name] for task in tasks]
        self.numbers = sorted({number for numbers in chosen for number in numbers})
        self.interaction = InteractionBlock(
            [architecture.interaction], columns, in_dim, architecture.token_dim, architecture.width
        )
        depth = len(architecture.experts[0])
        names_LN = [[architecture.experts[number - 1][level] for number in self.numbers] for level in range(depth)]
        self.blocks = nn.ModuleList(
            ChosenBlock(names, architecture.width, shared_input=level == 0) for level, names in enumerate(names_LN)
        )
        self.gate = gate.stack(num_tasks, architecture.width, len(self.numbers))
        hidden = [[number not in numbers for number in self.numbers] for numbers in chosen]
        self.register_buffer("hidden_TN", torch.tensor(hidden, device="cpu"), persistent=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        h_1BH = self.interaction.one(x_BD, 0).unsqueeze(0)
        h_NBH = h_1BH
        for block in self.blocks:
            h_NBH = block(h_NBH)
        return mix(self._gates(h_1BH), h_NBH).transpose(0, 1)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """Weights of the experts: gate_BTN."""
        return [self._gates(self.interaction.one(x_BD, 0).unsqueeze(0)).transpose(0, 1)]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Experts by their numbers in the architecture."""
        return [GateNames(list(tasks), [f"expert {number}" for number in self.numbers])]

    def _gates(self, h_1BH: Tensor) -> Tensor:
        return self.gate(h_1BH).masked_fill(self.hidden_TN.unsqueeze(1), -torch.inf).softmax(-1)


class Supernet(Fusion):
    """All architectures of a search space at once, with weights alpha of operations and beta of experts (section 3.4.1).

    The trainer of a search learns alpha and beta; nothing else does, so they are no parameters of a dense optimiser.

    Args:
        in_dim: D. num_tasks: T. columns: of each feature in x_BD. width: H. token_dim: of a feature's token.
        experts: N. depth: L. interaction, blocks: names of the candidates.
        nested: MLPs of a block share columns (models.automtl.operations.MLP).
        homogeneous: all experts have the same operations (the paper's ablation "hom Expert").
        selection: of experts: by beta, or by gates in the search and after it (its ablation "w/o SEL").
    Attributes:
        sharpness: of the softmax over candidates, which a search raises (see `weights`).
        auxiliary: weight of the input that every block adds to its output, to take from `skip` the advantage of easing
            training (DARTS-; Chu et al., arXiv 2009.01027, eq. 5).
        path: candidates that alone are computed, see `sample`; None: all.
    Shapes: x_BD -> h_BTD, D out = H.
    """

    reads_columns = True
    feature_layers = ("interaction",)

    def __init__(
        self, in_dim: int, num_tasks: int, columns: Sequence[Sequence[int]], width: Width, token_dim: Width,
        experts: Annotated[int, Field(ge=1, le=1000)], depth: Annotated[int, Field(ge=1, le=64)],
        interaction: Candidates, blocks: Candidates, nested: bool = True, homogeneous: bool = False,
        selection: Literal["beta", "gates"] = "beta",
    ) -> None:  # fmt: skip
        super().__init__()
        check_names(interaction, INTERACTIONS, "space.interaction")
        check_names(blocks, OPERATIONS, "space.blocks")
        self.out_dim, self.experts = width, experts
        self.interaction = InteractionBlock(interaction, columns, in_dim, token_dim, width, nested)
        self.blocks = nn.ModuleList(ExpertBlock(blocks, experts, width, nested) for _ in range(depth))
        own = 1 if homogeneous else experts
        # Almost even, as in DARTS. Frozen, so that only who searches differentiates by them.
        self.alpha_I = nn.Parameter(1e-3 * torch.randn(len(interaction)), requires_grad=False)
        self.alpha_NLO = nn.Parameter(1e-3 * torch.randn(own, depth, len(blocks)), requires_grad=False)
        self.beta_TN = nn.Parameter(1e-3 * torch.randn(num_tasks, experts), requires_grad=False)
        self.gate = LINEAR_GATES.stack(num_tasks, width, experts) if selection == "gates" else None
        self.sharpness, self.auxiliary = 1.0, 0.0
        self.path: Path | None = None

    def strengths(self) -> Strengths:
        """Weights of the candidates and of the experts of each task."""
        expert_NLO = self.weights(self.alpha_NLO).expand(self.experts, -1, -1)
        return Strengths(self.weights(self.alpha_I), expert_NLO, self.beta_TN.softmax(-1))

    def weights(self, alpha: Tensor) -> Tensor:
        """Softmax of sharpness * alpha. The sharper, the nearer the mixture comes to its strongest candidate alone, which is
        what a search keeps of it (annealed as in ASAP; Noy et al., arXiv 1904.04123)."""
        return (self.sharpness * alpha).softmax(-1)

    def sample(self, rng: torch.Generator | None, temperature: float = 1.0) -> None:
        """Draws the candidates of the next forward, one a block, with the probabilities of `weights`; None: all of them again.

        A candidate's weight is 1, with the gradient of softmax((sharpness * alpha + Gumbel noise) / temperature) (Jang et al.,
        arXiv 1611.01144, section 2.2; Dong & Yang, arXiv 1910.04465, eq. 3-7).
        """
        if rng is None:
            self.path = None
            return
        noise_I, noise_NLO = (
            -torch.empty(shape).exponential_(generator=rng).log().to(self.alpha_I.device)
            for shape in (self.alpha_I.shape, self.alpha_NLO.shape)
        )
        # Homogeneous experts have one alpha, so one draw.
        self.path = Path(noise_I, noise_NLO.expand(self.experts, -1, -1), temperature)

    def forward(self, x_BD: Tensor) -> Tensor:
        h_1BH, h_NBH = self._experts(x_BD)
        if self.gate is not None:
            return mix(self._gates(h_1BH), h_NBH).transpose(0, 1)
        task_TN = self.beta_TN.softmax(-1).to(h_NBH.dtype)
        return (task_TN @ h_NBH.flatten(1)).unflatten(1, h_NBH.shape[1:]).transpose(0, 1)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """Weights of the experts: gate_BTN, the same for all rows where beta selects them."""
        if self.gate is not None:
            return [self._gates(self._experts(x_BD)[0]).transpose(0, 1)]
        return [self.beta_TN.softmax(-1).expand(len(x_BD), -1, -1)]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Experts by their numbers."""
        return [GateNames(list(tasks), [f"expert {number + 1}" for number in range(self.experts)])]

    def _gates(self, h_1BH: Tensor) -> Tensor:
        assert self.gate is not None
        return self.gate(h_1BH).softmax(-1)

    def _experts(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' input h_1BH and outputs h_NBH."""
        if self.path is not None:
            return self._sampled(x_BD, self.path)
        strengths = self.strengths()
        h_BH = self.interaction(x_BD, strengths.interaction_I)
        h_BH = self._with_skip(h_BH, self.interaction.skip(x_BD) if self.auxiliary else None)
        h_NBH = h_1BH = h_BH.unsqueeze(0)
        for block, weight_NO in zip(self.blocks, strengths.expert_NLO.unbind(1), strict=True):
            h_NBH = self._with_skip(block(h_NBH, weight_NO), h_NBH)
        return h_1BH, h_NBH

    def _sampled(self, x_BD: Tensor, path: "Path") -> tuple[Tensor, Tensor]:
        choice, weight_I = path.of(self.sharpness * self.alpha_I, path.noise_I)
        choice_NL, weight_NLO = path.of(self.sharpness * self.alpha_NLO.expand_as(path.noise_NLO), path.noise_NLO)
        h_BH = self.interaction.one(x_BD, int(choice)) * weight_I[choice]
        h_BH = self._with_skip(h_BH, self.interaction.skip(x_BD) if self.auxiliary else None)
        # Every weight has a gradient, 0 where it was not drawn: ranks average the same ones in each step.
        h_BH = h_BH + 0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum().to(h_BH.dtype)
        h_NBH = h_1BH = h_BH.unsqueeze(0)
        for level, block in enumerate(self.blocks):
            assert isinstance(block, ExpertBlock)
            drawn_NBH = block.path(h_NBH, weight_NLO[:, level], choice_NL[:, level].tolist())
            h_NBH = self._with_skip(drawn_NBH, h_NBH)
        return h_1BH, h_NBH

    def _with_skip(self, h: Tensor, skip: Tensor | None) -> Tensor:
        return h + self.auxiliary * skip if self.auxiliary and skip is not None else h


class Path:
    """Gumbel noise of one forward: what is drawn from alpha with it."""

    def __init__(self, noise_I: Tensor, noise_NLO: Tensor, temperature: float) -> None:
        self.noise_I, self.noise_NLO, self.temperature = noise_I, noise_NLO, temperature

    def of(self, logit: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The index of what is drawn, and weights of all candidates: 1 for it and 0 for others, differentiable by logit."""
        soft = ((logit + noise) / self.temperature).softmax(-1)
        choice = soft.argmax(-1)
        return choice, F.one_hot(choice, soft.shape[-1]) + (soft - soft.detach())


def diversity_loss(beta_TN: Tensor) -> Tensor:
    """The negative Jensen-Shannon divergence of the tasks' selections (eq. 2): lower, the less tasks share experts."""
    # In logarithms: p log p has a gradient where a task has all but given up an expert and p rounds to 0.
    task_TN = beta_TN.log_softmax(-1)
    mean_N = task_TN.logsumexp(0) - math.log(len(task_TN))
    return (mean_N.exp() * mean_N).sum() - (task_TN.exp() * task_TN).sum(1).mean()
