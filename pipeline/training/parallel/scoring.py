"""A model that is sharded to be scored: the tables by the planner of training, nothing of what only training needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torchrec.distributed import DistributedModelParallel

from features.errors import UserError
from features.plain_json import first_fault
from models.ranker import Ranker, is_table
from models.table_storage import Precision
from pipeline.training.config import Settings
from pipeline.training.optim.settings import TableOptimizer
from pipeline.training.parallel import id_maps, plan, shard


def shard_for_scoring(
    ranker: Ranker,
    trained: Mapping[str, Any],
    where: Path,
    device: torch.device,
    precision: Precision,
    batch_size: int,
) -> None:
    """Replaces tables and maps of ids of a ranker by this rank's parts of them, whose content is undefined. All ranks call it.

    The tables have no optimiser state, and the dense part is left as it is: the same on all ranks once a checkpoint is loaded.

    Args:
        ranker: whose tables are on the meta device, in the number format of `precision`.
        trained: `train` of a run's config.yaml, which may be untrusted. where: that is, for messages.
        device: of the tables. batch_size: rows of a batch, over all ranks.
    Raises:
        UserError: settings that jobs.train does not write; a format that the tables' kernels do not have; too little memory.
    """
    if precision == "bf16":
        raise UserError(
            "table_precision=bf16: FBGEMM's kernels of sharded tables have fp32 and fp16 only. Use fp16, tables=needed, or one "
            "process."
        )
    settings = scoring_settings(trained, where, device, batch_size)
    for name, parameter in ranker.named_parameters():
        if not is_table(name):
            parameter.requires_grad_(False)  # so that the plan counts no gradients and no optimiser of the dense part
    id_maps.shard_maps(ranker, settings, device)
    sharders = shard.sharders(settings)
    placed = plan.plan(ranker, sharders, ranker.tables, settings, device)
    DistributedModelParallel(ranker, device=device, plan=placed, sharders=sharders, init_data_parallel=False)


def scoring_settings(trained: Mapping[str, Any], where: Path, device: torch.device, batch_size: int) -> Settings:
    """Settings that give the same logits on any number of ranks, and no state beside the tables.

    Of the run's own, those are kept that a table may need to fit: where its rows lie. Raises UserError for ones that jobs.train
    does not write.
    """
    try:
        known = Settings.model_validate(trained)
    except ValidationError as error:
        raise UserError(f"{where}: train.{first_fault(error)}. Restore it.") from None
    kernels = {"kernels": known.kernels} if device.type == "cuda" else {}
    nothing = {"tables": TableOptimizer(name="sgd"), "checkpoint_async": False}
    return Settings(batch_size=batch_size, pipelined=False, **nothing, **kernels)
