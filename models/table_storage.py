"""Tables of a ranker as scoring keeps them: with all rows or fewer, in 32 or 16 bits, allocated once that is known."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import DataType

from models.ranker import Ranker

Precision = Literal["fp32", "fp16", "bf16"]

FORMATS = {
    "fp32": (DataType.FP32, torch.float32),
    "fp16": (DataType.FP16, torch.float16),
    "bf16": (DataType.BF16, torch.bfloat16),
}


def store_tables(ranker: Ranker, precision: Precision, rows: Mapping[str, int] | None = None) -> None:
    """Replaces the tables of a ranker by ones of another number format, on the meta device. Lookups return float32.

    Args:
        ranker: whose tables are on the meta device.
        rows: of each table that does not keep all of them, by its name.
    """
    kind, dtype = FORMATS[precision]
    meta = torch.device("meta")

    def stored(table: Any) -> Any:
        return replace(table, num_embeddings=(rows or {}).get(table.name, table.num_embeddings), data_type=kind)

    pooled = [stored(table) for table in ranker.tables if isinstance(table, EmbeddingBagConfig)]
    single = [stored(table) for table in ranker.tables if isinstance(table, EmbeddingConfig)]
    # TorchRec makes fp16 parameters of every format but fp32.
    ranker.embeddings = EmbeddingBagCollection(pooled, device=meta).to(dtype) if pooled else None
    ranker.unpooled = EmbeddingCollection(single, device=meta).to(dtype) if single else None
    ranker.tables = [*pooled, *single]


def allocate_tables(ranker: Ranker, device: torch.device) -> None:
    """Gives tables and maps of ids that are on the meta device memory, whose content is undefined."""
    for module in (ranker.embeddings, ranker.unpooled, ranker.managed):
        if module is not None:
            module.to_empty(device=device)
