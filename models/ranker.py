"""The ranker: embeddings -> interaction -> fusion -> towers, written as for one device."""

# Shapes: B rows, T tasks, D input width, K keys of the sparse features.

from functools import partial
from typing import Any

import torch
import torch.fx
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType

from features.batch import Batch
from features.encoders import Encoders
from features.errors import UserError
from features.schema import Schema
from models.fusion import build_fusion
from models.towers import TaskTowers


class ModelConfig(BaseModel):
    """Settings of a model (jobs/conf/model/NAME.yaml).

    Attributes:
        fusion: `name`, one of models.fusion.FUSIONS, and the arguments of that class.
        tower: hidden layers of each task's tower.
        dropout: in towers.
        embedding_std: standard deviation of the embeddings' normal start.
    """

    model_config = ConfigDict(extra="forbid")
    fusion: dict[str, Any]
    tower: list[int] = [32]
    dropout: float = 0.0
    embedding_std: float = 0.01


class Ranker(nn.Module):
    """Scores the tasks of each row.

    Args:
        schema: features and tasks.
        encoders: for the tables' sizes.
        config: the architecture.
        device: of the embedding tables; "meta" leaves them to whoever shards them.
    Call Args:
        batch: B rows.
    Returns: logit_BT; for a regression task the prediction itself.
    Raises:
        UserError: a fusion or an argument of it that does not exist.
    """

    def __init__(self, schema: Schema, encoders: Encoders, config: ModelConfig, device: str = "meta") -> None:
        super().__init__()
        if not schema.sparse:
            raise UserError("the schema has no categorical and no bag feature: a ranker needs at least one table")
        self.features, self.bags = list(schema.sparse), list(schema.bag)
        self.embeddings = EmbeddingBagCollection(
            device=torch.device(device),
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    embedding_dim=table.dim,
                    num_embeddings=encoders.num_embeddings(name),
                    feature_names=[f for f in self.features if schema.table_of(f) == name],
                    # Bags are divided by their lengths in `_joined`: TorchRec 1.8 divides a table-wise bag twice once
                    # another table with means is row-wise, so its own mean would depend on the plan.
                    pooling=PoolingType.SUM,
                    init_fn=partial(nn.init.normal_, std=config.embedding_std),
                )
                for name, table in schema.all_tables.items()
                if any(schema.table_of(f) == name for f in self.features)
            ],
        )
        in_dim = sum(schema.all_tables[schema.table_of(f)].dim for f in self.features) + len(schema.dense_columns)
        self.fusion = build_fusion(config.fusion, in_dim, len(schema.tasks))
        self.towers = TaskTowers(len(schema.tasks), self.fusion.out_dim, config.tower, config.dropout)

    def inputs(self, batch: Batch) -> Tensor:
        """x_BD: embeddings in the schema's order, of bags their mean, then dense columns."""
        return _joined(self.embeddings(batch.sparse), batch.sparse, self.features, self.bags, batch.dense_BD)

    def forward(self, batch: Batch) -> Tensor:
        return self.towers(self.fusion(self.inputs(batch)))


def _joined(
    pooled: KeyedTensor, sparse: KeyedJaggedTensor, features: list[str], bags: list[str], dense_BD: Tensor
) -> Tensor:
    """Sums by name (a sharded KeyedTensor lists them by rank, an unsharded one by table), bags to means, then dense."""
    part = dict(zip(pooled.keys(), pooled.values().split(pooled.length_per_key(), dim=1), strict=True))
    if bags:
        length_KB1 = sparse.lengths().view(len(sparse.keys()), -1, 1).clamp(min=1)
        part |= {name: part[name] / length_KB1[sparse.keys().index(name)] for name in bags}
    return torch.cat([*(part[name] for name in features), dense_BD], dim=1)


torch.fx.wrap("_joined")  # TorchRec's pipelined loop traces the forward, and a loop over keys cannot be traced
