"""Settings of jobs.search: what is searched, and how."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from features.errors import UserError
from models.automtl import architecture
from models.automtl.blocks import check_names
from models.automtl.interactions import INTERACTIONS
from models.automtl.operations import OPERATIONS
from models.ranker import ModelConfig
from pipeline.training.config import TrainConfig
from pipeline.training.optim.strict import Strict

Names = Annotated[list[str], Field(min_length=1, max_length=1000)]
FUSION, SUPERNET = "automtl", "automtl_supernet"
# AutoMTL, table 1.
PAPER_INTERACTIONS = [
    "product_inner", "product_outer", "cross_1", "cross_2", "cross_3", "cross_4", "attention_1", "attention_2", "attention_4",
    "attention_8", "mlp_64", "mlp_128", "mlp_256", "mlp_512", "mlp_1024", "skip",
]  # fmt: skip
PAPER_BLOCKS = [
    "gating", "mlp_16", "mlp_32", "mlp_64", "mlp_128", "mlp_256", "mlp_512", "mlp_1024", "conv_3", "conv_5", "conv_7", "skip",
]  # fmt: skip


class Space(Strict):
    """The architectures that a search chooses from (models.fusion.automtl.Supernet).

    Attributes:
        width: of every block's output. token_dim: of a feature's token, which products and attention read.
        experts: how many. depth: blocks of each. chosen: experts that each task keeps.
        interaction: candidates of the feature interaction. blocks: of each block of an expert.
        nested: MLPs of a block share their columns.
        homogeneous: all experts have the same operations. selection: of experts, by beta or by gates.
    """

    width: int = Field(64, ge=1, le=1 << 16)
    token_dim: int = Field(8, ge=1, le=1 << 16)
    experts: int = Field(8, ge=1, le=1000)
    depth: int = Field(3, ge=1, le=64)
    chosen: int = Field(4, ge=1)
    interaction: Names = Field(PAPER_INTERACTIONS)
    blocks: Names = Field(PAPER_BLOCKS)
    nested: bool = True
    homogeneous: bool = False
    selection: Literal["beta", "gates"] = "beta"

    @field_validator("interaction", "blocks")
    @classmethod
    def _known(cls, names: list[str], info: Any) -> list[str]:
        try:
            check_names(names, INTERACTIONS if info.field_name == "interaction" else OPERATIONS, "a candidate")
        except UserError as error:
            raise ValueError(str(error)) from None
        if len({*names}) < len(names):
            raise ValueError("a candidate is there twice: leave one out")
        return names

    @model_validator(mode="after")
    def _enough(self) -> "Space":
        if self.chosen > self.experts:
            raise ValueError(f"chosen: {self.chosen} of {self.experts} experts: choose as many or fewer")
        return self

    def supernet(self) -> dict[str, Any]:
        """The fusion that holds all of them, as a model's config has it."""
        return {"name": SUPERNET, **self.model_dump(exclude={"chosen"})}

    def named(self, tasks: list[str]) -> architecture.Space:
        """For `architecture.derive`. With gates every task keeps every expert."""
        chosen = self.experts if self.selection == "gates" else self.chosen
        return architecture.Space(self.interaction, self.blocks, tasks, self.width, self.token_dim, chosen)


class Budget(Strict):
    """The most FLOPs of a row's forward pass that the found model may have.

    Attributes:
        flops: of a row; or a share of what `model` takes on the same dataset.
        model: such as that of jobs/conf/model/adatt.yaml; None: flops is a number of FLOPs.
        weight: of relu(expected FLOPs / budget - 1) in the loss of alpha.
    """

    flops: float = Field(gt=0)
    model: ModelConfig | None = None
    weight: float = Field(1.0, ge=0)


class Search(Strict):
    """How a search learns.

    Attributes:
        method: gradient, or random: one architecture (within the budget, if there is one) is drawn and nothing is trained.
        order: of the gradient of alpha: 1, or 2 as in eq. 4.
        paths: all candidates in a step, or one a block (Gumbel-softmax, with `temperature`).
        sharpness: factor of alpha in its softmax by the last step, rising from 1 by the same factor in each; 1 as in the paper.
            There the mixture stays soft, and what is strongest in it is often not what does best alone.
        alpha_lr, beta_lr: of Adam. alpha_every: steps between updates of alpha.
        alpha_warmup, warmup: shares of the steps before alpha, and before beta, is trained. The paper has none for alpha: where
            weights are fresh, candidates win that need no training.
        diversity: weight of the auxiliary loss of beta (eq. 2) after the warm-up; it falls linearly to 0 by the last step. The
            paper's is 1, with which Adam lets it outweigh the tasks.
        auxiliary: weight of the skip around each block at the start; it falls linearly to 0 by the last step.
        evaluate_every: steps between evaluations of the architecture; None: a twentieth of the run.
        patience: the search ends once so many of them in a row after both warm-ups have found the same one; None: never.
        budget: None for none.
    """

    method: Literal["gradient", "random"] = "gradient"
    order: Literal[1, 2] = 1
    paths: Literal["all", "one"] = "all"
    temperature: float = Field(1.0, gt=0)
    sharpness: float = Field(10.0, ge=1)
    alpha_lr: float = Field(1e-3, gt=0)
    beta_lr: float = Field(1e-3, gt=0)
    alpha_every: int = Field(1, ge=1)
    alpha_warmup: float = Field(0.0, ge=0, le=1)
    warmup: float = Field(0.25, ge=0, le=1)
    diversity: float = Field(0.01, ge=0)
    auxiliary: float = Field(1.0, ge=0)
    evaluate_every: int | None = Field(None, ge=1)
    patience: int | None = Field(5, ge=1)
    budget: Budget | None = None


class SearchConfig(TrainConfig):
    """A search: a run of jobs.train over a space of architectures."""

    space: Space = Space()
    search: Search = Search()

    @model_validator(mode="after")
    def _possible(self) -> "SearchConfig":
        if self.model.fusion.get("name") not in (FUSION, SUPERNET):
            raise ValueError(f"model: jobs.search finds architectures of model={FUSION}")
        train = self.train
        if train.weighting.name not in ("fixed", "equal"):
            raise ValueError(f"train.weighting.name={train.weighting.name} has a state of its own: use fixed or equal")
        for setting, refused in (
            ("dense_parallel=fsdp", train.dense_parallel == "fsdp"),
            ("pipelined=true", train.pipelined),
            ("accumulate", train.accumulate > 1),
            (f"compile={train.compile}", train.compile),
        ):
            if refused:
                raise ValueError(f"train.{setting} does not go with a step on two batches: leave it out")
        self.model.fusion = self.space.supernet()
        self.model.architecture = None
        return self

    def shape(self) -> dict[str, Any]:
        """As of a training run; what the state of a search depends on is in it."""
        return super().shape() | {
            "search": self.search.model_dump(include={"order", "paths", "warmup", "alpha_every", "alpha_warmup"})
        }
