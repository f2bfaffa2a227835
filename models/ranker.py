"""The ranker: embeddings and numbers -> interaction -> fusion -> towers, written as for one device."""

# Shapes: B rows, T tasks, D input width, K keys of the sparse features.

from functools import partial
from typing import Any, Literal

import torch
import torch.fx
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType

from features.batch import Batch
from features.encoders import Encoders
from features.errors import UserError
from features.schema import Schema
from models.fusion import build_fusion, fusion_class
from models.inputs import Inputs, Tokens
from models.interaction import Concat, build_interaction
from models.towers import Calibration, SharedTower, TaskTowers


class ModelConfig(BaseModel):
    """Settings of a model (jobs/conf/model/NAME.yaml).

    Attributes:
        interaction: `name`, one of models.interaction.INTERACTIONS, and the arguments of that class.
        fusion: `name`, one of models.fusion.FUSIONS, and the arguments of that class.
        tower: hidden layers of each task's tower.
        input_dropout: of what the interaction reads. dropout: in towers.
        calibration: of the towers' logits: "none", or "monotone" (models.towers.Calibration).
        embedding_std: standard deviation of the embeddings' normal start.
        numeric_dim: width of a piecewise number's code; 0 leaves codes out.
        field_dim: width of a token, for what attends over features.
        from_: `from` in a config: runs of trained single-task models, for fusion emm (models.emm).
    """

    model_config = ConfigDict(extra="forbid")
    interaction: dict[str, Any] = {"name": "concat"}
    fusion: dict[str, Any]
    tower: list[int] = [32]
    input_dropout: float = Field(0.0, ge=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    calibration: Literal["none", "monotone"] = "none"
    embedding_std: float = 0.01
    numeric_dim: int = Field(8, ge=0)
    field_dim: int = Field(16, ge=1)
    from_: list[str] | None = Field(None, alias="from")


class Ranker(nn.Module):
    """Scores the tasks of each row.

    Args:
        schema: features and tasks.
        encoders: for the tables' sizes and the bins of numbers.
        config: the architecture.
        device: of the embedding tables; "meta" leaves them to whoever shards them.
    Call Args:
        batch: B rows.
    Returns: logit_BT; for a regression task the prediction itself.
    Raises:
        UserError: a fusion, an interaction or an argument of it that does not exist, or two that do not go together.
    """

    def __init__(self, schema: Schema, encoders: Encoders, config: ModelConfig, device: str = "meta") -> None:
        super().__init__()
        self.features, self.bags = list(schema.sparse), {name: name for name in schema.bag}
        self.embeddings = EmbeddingBagCollection(
            table_configs(schema, encoders, config.embedding_std), device=torch.device(device)
        )
        self.numbers = Inputs(schema, encoders, config.numeric_dim)
        self.dropout = nn.Dropout(config.input_dropout)
        kind = fusion_class(config.fusion)
        self.interaction = build_interaction(config.interaction, self.numbers, config.field_dim)
        if kind.fields and not isinstance(self.interaction, Concat):
            raise UserError(
                f"model.interaction: fusion {config.fusion['name']} attends over features itself, use concat"
            )
        self.tokens = Tokens(self.numbers.columns, self.numbers.out_dim, config.field_dim) if kind.fields else None
        in_dim = config.field_dim if kind.fields else self.interaction.out_dim
        self.fusion = build_fusion(config.fusion, in_dim, list(schema.tasks), list(self.numbers.columns))
        towers = SharedTower if kind.shared_tower else TaskTowers
        self.towers: nn.Module = towers(len(schema.tasks), self.fusion.out_dim, config.tower, config.dropout)
        kinds = [task.kind for task in schema.tasks.values()]
        self.calibration = Calibration(kinds) if config.calibration == "monotone" else None

    def embedded(self, batch: Batch) -> Tensor:
        """Embeddings of all features side by side, a bag's as their mean: embedding_BE."""
        return _joined(self.embeddings(batch.sparse), batch.sparse, self.features, self.bags)

    def inputs(self, batch: Batch) -> Tensor:
        """What the fusion reads: x_BD, or x_BFD for one that attends over features."""
        x_BD = self.dropout(self.numbers(self.embedded(batch), batch.dense_BD))
        return self.interaction(x_BD) if self.tokens is None else self.tokens(x_BD)

    def forward(self, batch: Batch) -> Tensor:
        observed = (batch.observed_BT,) if self.fusion.reads_observed else ()
        logit_BT = self.towers(self.fusion(self.inputs(batch), *observed))
        return self.fusion.taught(logit_BT if self.calibration is None else self.calibration(logit_BT))


def table_configs(schema: Schema, encoders: Encoders, std: float, suffix: str = "") -> list[EmbeddingBagConfig]:
    """The schema's tables, with their names and `suffix`; std: of their start. Raises UserError where there is none."""
    if not schema.sparse:
        raise UserError("the schema has no categorical and no bag feature: a ranker needs at least one table")
    return [
        EmbeddingBagConfig(
            name=name + suffix,
            embedding_dim=table.dim,
            num_embeddings=encoders.num_embeddings(name),
            feature_names=features,
            # Bags are divided by their lengths in `_joined`: TorchRec 1.8 divides a table-wise bag twice once another
            # table with means is row-wise, so its own mean would depend on the plan.
            pooling=PoolingType.SUM,
            init_fn=partial(nn.init.normal_, std=std),
        )
        for name, table in schema.all_tables.items()
        if (features := [f for f in schema.sparse if schema.table_of(f) == name])
    ]


def _joined(pooled: KeyedTensor, sparse: KeyedJaggedTensor, features: list[str], bags: dict[str, str]) -> Tensor:
    """Sums by name (a sharded KeyedTensor lists them by rank, an unsharded one by table), bags to means.

    Args:
        features: names of sums, in the order wanted. bags: those of bags, with the keys of their ids.
    """
    part = dict(zip(pooled.keys(), pooled.values().split(pooled.length_per_key(), dim=1), strict=True))
    if bags:
        length_KB1 = sparse.lengths().view(len(sparse.keys()), -1, 1).clamp(min=1)
        part |= {name: part[name] / length_KB1[sparse.keys().index(key)] for name, key in bags.items()}
    return torch.cat([part[name] for name in features], dim=1)


torch.fx.wrap("_joined")  # TorchRec's pipelined loop traces the forward, and a loop over keys cannot be traced
