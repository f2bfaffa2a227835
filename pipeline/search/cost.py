"""What candidates and models of a search cost, counted on one row."""

from typing import Any

import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError
from models.automtl import architecture
from models.automtl.architecture import Architecture
from models.automtl.blocks import ChosenBlock, InteractionBlock
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.model_cost import dense_cost, flop_counter
from pipeline.search.config import FUSION, Budget, Space
from pipeline.training.architecture_file import with_architecture


def derived_model(model: ModelConfig, found: Architecture) -> ModelConfig:
    """The model that is trained from scratch: towers and all else as the search had them."""
    fusion = {"name": FUSION, "architecture": found.model_dump(exclude={"strengths"})}
    return model.model_copy(update={"fusion": fusion})


def cost_of(model: ModelConfig, dataset: Dataset, embedding_BE: Tensor, batch: Batch) -> dict[str, Any]:
    """Parameters and FLOPs of a row of a model; its tables are not allocated.

    Args:
        embedding_BE: of the batch, as any model of this dataset has it.
    """
    return dense_cost(
        Ranker(dataset.schema, dataset.encoders, model), embedding_BE.cpu(), batch.to(torch.device("cpu"))
    )


def budget_of(
    settings: Budget,
    space: Space,
    ranker: Ranker,
    model: ModelConfig,
    dataset: Dataset,
    embedding_BE: Tensor,
    batch: Batch,
) -> architecture.Budget:
    """What is left of a budget for interaction and blocks, once towers, gates and what prepares the input are paid.

    Args:
        ranker: of the search. model: its settings. embedding_BE: of the batch.
    Raises:
        UserError: nothing is left, or the model that it is a share of needs an architecture.
    """
    limit = settings.flops
    if settings.model is not None:
        limit *= cost_of(with_architecture(settings.model), dataset, embedding_BE, batch)["flops_per_row"]
    columns, in_dim = list(ranker.numbers.columns.values()), ranker.numbers.out_dim
    interaction = {
        name: _flops(InteractionBlock([name], columns, in_dim, space.token_dim, space.width), torch.zeros(1, in_dim))
        for name in space.interaction
    }
    blocks = {
        name: _flops(ChosenBlock([name], space.width, shared_input=False), torch.zeros(1, 1, space.width))
        for name in space.blocks
    }
    tasks = list(dataset.schema.tasks)
    every = list(range(1, space.experts + 1))
    cheapest = Architecture(
        width=space.width, token_dim=space.token_dim, interaction="skip", experts=[["skip"]] * space.experts,
        tasks=dict.fromkeys(tasks, every),
    )  # fmt: skip
    fixed = cost_of(derived_model(model, cheapest), dataset, embedding_BE, batch)["flops_per_row"]
    fixed -= _flops(InteractionBlock(["skip"], columns, in_dim, space.token_dim, space.width), torch.zeros(1, in_dim))
    if limit <= fixed:
        raise UserError(
            f"search.budget: {limit:,.0f} FLOPs a row, of which towers, gates and input take {fixed:,.0f}. Raise flops, or "
            "lower space.width, model.tower or model.numeric_dim."
        )
    return architecture.Budget(interaction, blocks, limit - fixed, space.named(tasks).chosen)


@torch.no_grad()
def _flops(block: InteractionBlock | ChosenBlock, x: Tensor) -> float:
    with flop_counter() as counter:
        if isinstance(block, InteractionBlock):
            block.one(x, 0)
        else:
            block(x)
    return float(counter.get_total_flops())
