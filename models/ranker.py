"""The ranker: embeddings and numbers -> interaction -> fusion -> towers, written as for one device."""

# Shapes: B rows, T tasks, D input width, K numbers a task; in `_joined` keys of the sparse features; G bags, W width of one.

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.fx
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
    PoolingType,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from features.batch import Batch
from features.errors import UserError, join_faults
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from features.schema.task import given_chain
from models.fusion import build_fusion, fusion_class
from models.fusion.tasks import task_infos
from models.inputs import Inputs, Tokens
from models.interaction import Concat, build_interaction
from models.label_units import LabelUnits
from models.managed import managed_ids, with_rows
from models.row_losses import GivenConfig, RowLosses
from models.sequences import (
    Sequences,
    WithItems,
    concat_items,
    mean_pooled,
    pooled_features,
    sequences_of,
    unpooled_tables,
)
from models.towers import Calibration, TowerLayers, Towers, build_towers, widths_by_task

POOLED, UNPOOLED = "embeddings", "unpooled"  # the modules of a ranker that hold tables
INPUT_MODULES = ("numbers", "interaction", "tokens", "sequences")  # those between tables and fusion


class ModelConfig(BaseModel):
    """Settings of a model (jobs/conf/model/NAME.yaml).

    Attributes:
        interaction: `name`, one of models.interaction.INTERACTIONS, and the arguments of that class.
        fusion: `name`, one of models.fusion.FUSIONS, and the arguments of that class.
        tower: hidden layers of each task's tower: one list for all tasks, or a mapping from task to list.
        input_dropout: of the interaction's input. dropout: in towers.
        calibration: of the towers' logits: "none", or "monotone" (models.towers.Calibration).
        start: of the towers' biases: "base_rate", or "zero", near 0 as any other layer.
        given: how tasks that are given others are learnt (models.row_losses).
        embedding_std: standard deviation of the embeddings' normal initialisation.
        numeric_dim: width of a piecewise number's code; 0 leaves codes out.
        field_dim: width of a token, for what attends over features.
        architecture: for fusion automtl: a file or a run of jobs.search.
        from_: `from` in a config: runs of trained single-task models, for fusion emm (models.emm).
    """

    model_config = ConfigDict(extra="forbid")
    interaction: dict[str, Any] = {"name": "concat"}
    fusion: dict[str, Any]
    tower: TowerLayers = [32]
    input_dropout: float = Field(0.0, ge=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    calibration: Literal["none", "monotone"] = "none"
    start: Literal["base_rate", "zero"] = "base_rate"
    given: GivenConfig = GivenConfig()
    embedding_std: float = Field(0.01, ge=0, allow_inf_nan=False)
    numeric_dim: int = Field(8, ge=0, le=1 << 16)
    field_dim: int = Field(16, ge=1, le=1 << 16)
    architecture: str | None = None
    from_: list[str] | None = Field(None, alias="from")

    @classmethod
    def of_run(cls, content: dict[str, Any], run: Path) -> "ModelConfig":
        """The model of a run's config.yaml, which may be untrusted. Raises UserError where it is none."""
        try:
            return cls.model_validate(content["model"])
        except ValidationError as error:
            faults = join_faults([f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()])
            raise UserError(f"{run / 'config.yaml'}: {faults}. It is not as jobs.train wrote it: restore it.") from None


class Ranker(nn.Module):
    """Scores the tasks of each row.

    Args:
        schema: features and tasks.
        encoders: for the tables' sizes and the bins of numbers.
        config: the architecture.
        device: of the embedding tables; "meta" leaves their allocation to the sharding.
    Call Args:
        batch: B rows.
    Returns: logit_BT; for a regression task the prediction, in the label's unit.
    Raises:
        UserError: a fusion, an interaction or an argument of it that does not exist, or two that do not go together.
    """

    sets = 1  # of embeddings (Fusion.table_sets)
    fields: Sequence[str] = ()  # names of the features that the fusion reads one by one

    def __init__(self, schema: Schema, encoders: Encoders, config: ModelConfig, device: str = "meta") -> None:
        super().__init__()
        kind = fusion_class(config.fusion)
        self.sets = kind.table_sets(len(schema.tasks))
        self._place_tables(schema, encoders, config.embedding_std, torch.device(device))
        self.managed = managed_ids(schema, device)
        self.numbers = Inputs(schema, encoders, config.numeric_dim, self.sets)
        self.dropout = nn.Dropout(config.input_dropout)
        self.interaction = build_interaction(config.interaction, self.numbers, config.field_dim)
        if (kind.fields or kind.reads_columns or self.sets > 1) and not isinstance(self.interaction, Concat):
            reason = "attends over features itself" if kind.fields else "reads the features themselves"
            raise UserError(f"model.interaction: fusion {config.fusion['name']} {reason}, use concat")
        if self.sets > 1 and self.lengths:
            raise UserError(
                f"bag {next(iter(self.lengths))}: fusion {config.fusion['name']} reads no sequences; set pooling: mean, or "
                "choose another fusion"
            )
        self.tokens = Tokens(self.numbers.columns, self.numbers.out_dim, config.field_dim) if kind.fields else None
        self.sequences = Sequences(schema, config.field_dim if kind.sequences else 0) if self.lengths else None
        in_dim = config.field_dim if kind.fields else self.interaction.out_dim
        self.fields = fields = list(self.numbers.columns)
        columns = list(self.numbers.columns.values())
        infos, names = task_infos(schema.tasks), list(schema.tasks)
        self.fusion = build_fusion(config.fusion, in_dim, names, fields, self.lengths, columns, infos)
        self.place_heads(schema, encoders, config)
        widths, sizes = widths_by_task(config.tower, list(schema.tasks)), self.units.sizes
        self.towers: Towers = build_towers(widths, self.fusion.out_dim, config.dropout, sizes, kind.shared_tower)
        if self.row_losses.entire_space:
            self._check_entire_space(config, names)

    def _check_entire_space(self, config: ModelConfig, tasks: Sequence[str]) -> None:
        if self.fusion.reads_observed:
            raise UserError(
                f"model.given.name: {config.given.name} learns from all impressions, fusion {config.fusion['name']} from "
                "observed labels alone. Set model.given.name=observed, or model.fusion.examples=tasks: a row is then an "
                "example of every task."
            )
        if unseen := [tasks[t] for t in self.fusion.unseen if tasks[t] in self.row_losses.chained]:
            raise UserError(
                f"model.fusion.unseen: with model.given.name={config.given.name} labels of {unseen[0]} train other tasks too. "
                "Set model.given.name=observed, or hold out another task."
            )

    def place_heads(self, schema: Schema, encoders: Encoders, config: ModelConfig) -> None:
        imputed = [name for name in schema.tasks if given_chain(schema.tasks, name)]
        if config.given.name != "observed" and not imputed:
            left_out = sorted({task.given for task in schema.tasks.values() if task.given})
            what = f"{', '.join(left_out)} is not among tasks=" if left_out else "no task has `given`"
            advice = "Add it there" if left_out else "Write one in the schema, such as tasks.conversion.given: click"
            raise UserError(
                f"model.given.name: {config.given.name} learns tasks that are given others, and {what}. {advice}, or set "
                "model.given.name=observed."
            )
        self.units = LabelUnits(schema.tasks, encoders.labels, frozenset(imputed if config.given.name == "dr" else ()))
        self.row_losses = RowLosses(schema.tasks, self.units, config.given)
        kinds = [task.kind for task in schema.tasks.values()]
        self.calibration = Calibration(kinds) if config.calibration == "monotone" else None

    def _place_tables(self, schema: Schema, encoders: Encoders, std: float, device: torch.device) -> None:
        self.features = pooled_features(schema)
        self.lengths = {name: bag.max_length for name, bag in sequences_of(schema).items()}
        unpooled, tables = unpooled_tables(schema), table_configs(schema, encoders, std, sets=self.sets)
        self.bags = {name: name for name in schema.lists if schema.table_of(name) not in unpooled}
        pooled = [table for table in tables if table.name not in unpooled]
        single = [_item_by_item(table) for table in tables if table.name in unpooled]
        self.embeddings = EmbeddingBagCollection(pooled, device=device) if pooled else None
        self.unpooled = EmbeddingCollection(single, device=device) if single else None
        self.tables: list[BaseEmbeddingConfig] = [*pooled, *single]

    def reads_features(self, name: str, shape: Sequence[int], /) -> bool:
        """Whether a tensor of the network weighs features by their places in x_BD or among the tokens.

        These are its first layers; of one that attends over features, all of it.
        """
        part = name.split(".")[0]
        first = part in INPUT_MODULES or (part == "fusion" and self.interaction.out_dim in shape)
        first |= name.startswith(tuple(f"fusion.{layer}." for layer in self.fusion.feature_layers))
        return first or self.tokens is not None

    def embedded(self, batch: Batch) -> Tensor:
        """The embeddings of all features, concatenated: embedding_BE. A bag's is the mean of its items.

        The items of sequences come after all other features (models.sequences.concat_items). Where an id has several, these are
        the first of all features, then the second of all, and so on.
        """
        sparse = with_rows(self.managed, batch.sparse)
        pooled = self.embeddings(sparse) if self.embeddings is not None else None
        unpooled = self.unpooled(sparse) if self.unpooled is not None else None
        return _joined(pooled, unpooled, batch.sparse, self.features, self.bags, self.lengths, self.sets)

    def inputs(self, batch: Batch) -> Tensor | WithItems:
        """The input of the fusion: x_BD, x_BFD for one that attends over features, or these with the items of sequences.

        Where an id has several embeddings, x_BSD.
        """
        return self.read(self.embedded(batch), batch)

    def read(self, embedding_BE: Tensor, batch: Batch) -> Tensor | WithItems:
        """`inputs` from the embeddings; of `batch` everything but `sparse`."""
        item_BJLW = None
        if self.sequences is not None:
            embedding_BE, item_BJLW, present_BJL = self.sequences(embedding_BE)
        x_BD = self.dropout(self.numbers(embedding_BE, batch.dense_BD))
        x = self.interaction(x_BD) if self.tokens is None else self.tokens(x_BD)
        return x if item_BJLW is None else WithItems(x, item_BJLW, present_BJL)

    def dense_outputs(self, embedding_BE: Tensor, batch: Batch) -> Tensor:
        """The dense part, from embeddings to out_KBT, row by row; of `batch` everything but `sparse`."""
        observed = (batch.observed_BT,) if self.fusion.reads_observed else ()
        out_KBT = self.towers(self.fusion(self.read(embedding_BE, batch), *observed))
        if self.calibration is not None:
            out_KBT = torch.cat([self.calibration(out_KBT[0]).unsqueeze(0), out_KBT[1:]])
        return self.fusion.detach_unseen(out_KBT)

    def outputs(self, batch: Batch) -> Tensor:
        """out_KBT, which losses are made of (models.label_units)."""
        return self.dense_outputs(self.embedded(batch), batch)

    def forward(self, batch: Batch) -> Tensor:
        return self.units(self.outputs(batch))

    def start_at(self, rates: Mapping[str, float]) -> None:
        """Sets the towers' biases to what is known before anything is learnt of the rows.

        A start near 0 is a probability of 1/2 for a task of 2%: the first steps would be spent on what one number per task
        says, and all that tasks share would pay for it.

        Args:
            rates: weighted mean train label of each binary task.
        """
        self.towers.start_at(self.fusion.start(self.units.start(rates)))


def is_table(name: str) -> bool:
    """Whether a name of a ranker's state dict, or of one of its modules, is that of a table or of what holds them."""
    return name.split(".")[0] in (POOLED, UNPOOLED)


def table_weight(table: str, pooled: bool = True) -> str:
    """The name of a table's weight in a ranker's state dict. pooled: False for a table that is looked up item by item."""
    return f"{POOLED}.embedding_bags.{table}.weight" if pooled else f"{UNPOOLED}.embeddings.{table}.weight"


def table_of(name: str) -> str:
    """The table whose weight has a name, in a ranker or in a module around it: the inverse of `table_weight`."""
    return name.split(".")[-2]


def table_weights(ranker: Ranker) -> dict[str, str]:
    """Of each table of a ranker, the name of its weight in the state dict."""
    return {table.name: table_weight(table.name, isinstance(table, EmbeddingBagConfig)) for table in ranker.tables}


def table_configs(
    schema: Schema, encoders: Encoders, std: float, suffix: str = "", sets: int = 1
) -> list[EmbeddingBagConfig]:
    """The schema's tables, with their names and `suffix`; std: of their initial values; sets: embeddings of each id.

    Raises:
        UserError: there is none.
    """
    if not schema.sparse:
        raise UserError("the schema has no categorical and no bag feature: a ranker needs at least one table")
    return [
        EmbeddingBagConfig(
            name=name + suffix,
            embedding_dim=table.dim * sets,
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


def _item_by_item(table: EmbeddingBagConfig) -> EmbeddingConfig:
    return EmbeddingConfig(
        name=table.name,
        embedding_dim=table.embedding_dim,
        num_embeddings=table.num_embeddings,
        feature_names=table.feature_names,
        init_fn=table.init_fn,
    )


def _joined(
    pooled: KeyedTensor | None,
    unpooled: dict[str, JaggedTensor] | None,
    sparse: KeyedJaggedTensor,
    features: list[str],
    bags: dict[str, str],
    lengths: dict[str, int],
    sets: int,
) -> Tensor:
    """Sums by name (a sharded KeyedTensor lists them by rank, an unsharded one by table), bags to means; sequences last.

    Args:
        features: names of sums, in the order wanted. bags: those of bags, with the keys of their ids.
        lengths: the most items of each sequence.
        sets: parts of each sum; then the order is part by part, and by feature within.
    """
    part: dict[str, Tensor] = {}
    if pooled is not None:
        part |= zip(pooled.keys(), pooled.values().split(pooled.length_per_key(), dim=1), strict=True)
    if bags:
        length_KB1 = sparse.lengths().view(len(sparse.keys()), -1, 1).clamp(min=1)
        length = {name: length_KB1[sparse.keys().index(key)] for name, key in bags.items()}
        part |= bag_means({name: part[name] for name in bags}, length, together=sparse.device().type != "cpu")
    if unpooled is None and sets > 1:
        return torch.cat([part[name].unflatten(1, (sets, -1)) for name in features], dim=2).flatten(1)
    if unpooled is None:
        return torch.cat([part[name] for name in features], dim=1)
    part |= mean_pooled(unpooled, lengths)
    return torch.cat([*(part[name] for name in features), *concat_items(unpooled, lengths)], dim=1)


def bag_means(sums: Mapping[str, Tensor], length: Mapping[str, Tensor], together: bool) -> dict[str, Tensor]:
    """Sums of bags, each (B, W), by their lengths, each (B, 1).

    Args:
        together: bags of one width are divided at once: a GPU takes longer to start a kernel than to divide one bag. A CPU is
            faster bag by bag, which stay in its cache.
    """
    if not together:
        return {name: sum_BW / length[name] for name, sum_BW in sums.items()}
    found: dict[str, Tensor] = {}
    for width in {sum_BW.shape[1]: None for sum_BW in sums.values()}:
        names = [name for name, sum_BW in sums.items() if sum_BW.shape[1] == width]
        mean_BGW = torch.stack([sums[name] for name in names], 1) / torch.stack([length[name] for name in names], 1)
        found |= zip(names, mean_BGW.unbind(1), strict=True)
    return found


torch.fx.wrap("_joined")  # TorchRec's pipelined loop traces the forward, and a loop over keys cannot be traced
