"""The ranker of a model that is fused from trained ones (models.fusion.emm): its tables, inputs and towers are theirs."""

# Shapes: B rows, T tasks, M trained models, E width of all embeddings of a model, D width.

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection

from features.batch import Batch
from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from features.schema.task import given_chain
from models.chains import ChainLayer, chain_of
from models.fusion.decomposition import TrainedModel
from models.fusion.emm import EMM
from models.inputs import Inputs
from models.interaction import build_interaction
from models.managed import managed_tables
from models.ranker import ModelConfig, Ranker, table_configs, table_weight
from models.sequences import sequences_of
from models.towers import OwnTowers, Towers, build_towers, widths_by_task


class Source(BaseModel):
    """A trained single-task model, described so that a fused run can be rebuilt without it.

    Attributes:
        run: folder. step: of its checkpoint.
        task: what it was trained for. model: its settings.
    """

    model_config = ConfigDict(extra="forbid")
    run: str
    step: int
    task: str
    model: ModelConfig

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.run} ({self.task})"

    @property
    def chain(self) -> list[ChainLayer]:
        """Its layers below the tower. Raises UserError where its fusion is no chain of layers."""
        if (chain := chain_of(self.model.fusion)) is None:
            raise UserError(
                f"model.from: fusion {self.model.fusion['name']} of {self.name} is no plain chain of layers"
            )
        return chain

    @property
    def tower(self) -> list[int]:
        """Of the hidden layers of its tower."""
        return widths_by_task(self.model.tower, [self.task])[0]

    @property
    def layer_names(self) -> list[str]:
        """Of all its layers with ReLU, in its state."""
        below = [f"fusion.{layer.name}" for layer in self.chain]
        return below + [f"towers.hidden.layers.{k}" for k in range(len(self.tower))]


class EMMSettings(BaseModel):
    """`model.fusion` of a fused model.

    Attributes:
        trained: False keeps the structure only: fresh weights, all of them trained (Table II).
        merge: False leaves the exchange between tasks out (Table II).
        projection: of the merge's Q, K and V: "relu" (the paper's text) or "linear" (its code), see models.fusion.emm.Merge.
        tables: of the inputs of the trained models (embeddings, codes of numbers, interactions): "frozen" as they are,
            "tuned" along with the rest, or "new", one set for all.
        towers: "own": each task's continues above the last cut of its model, or of its first model where it has several;
            "new": model.tower, from fresh weights. They are trained either way. The authors' code has both new
            (jobs/conf/recipe/emm_census.yaml).
        sources: the models of `model.from`, resolved when a run begins.
    """

    model_config = ConfigDict(extra="forbid")
    name: Literal["emm"]
    trained: bool = True
    merge: bool = True
    projection: Literal["relu", "linear"] = "relu"
    tables: Literal["frozen", "tuned", "new"] = "frozen"
    towers: Literal["own", "new"] = "own"
    sources: list[Source] = []

    @classmethod
    def of(cls, config: ModelConfig) -> "EMMSettings":
        """Those of a model. Raises UserError for what they do not allow."""
        try:
            return cls.model_validate(config.fusion)
        except ValidationError as error:
            faults = (f"model.fusion.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"{'; '.join(faults)} (fusion emm)") from None


class Reader(nn.Module):
    """The input of a trained model's first layer: embeddings and numbers, then its interaction.

    Its parts have the names that they have in a Ranker.

    Args:
        config: the trained model's. dropout: of what the interaction reads, of the fused model.
    Shapes: embedding_BE, dense_BD -> x_BD.
    """

    def __init__(self, schema: Schema, encoders: Encoders, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.numbers = Inputs(schema, encoders, config.numeric_dim)
        self.dropout = nn.Dropout(dropout)
        self.interaction = build_interaction(config.interaction, self.numbers, config.field_dim)
        self.out_dim = self.interaction.out_dim

    def forward(self, embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:
        return self.interaction(self.dropout(self.numbers(embedding_BE, dense_BD)))


class FusedRanker(Ranker):
    """A ranker over trained models, each with tables of its own, named TABLE@M, unless one new set serves all.

    Frozen tables are cut from the graph: their optimiser, which is fused into the backward, never sees a gradient.

    Args, Call Args, Returns: as Ranker's.
    Raises:
        UserError: settings that do not fit, or models that share no layer.
    """

    def __init__(self, schema: Schema, encoders: Encoders, config: ModelConfig, device: str = "meta") -> None:
        nn.Module.__init__(self)  # not Ranker's, which builds the parts of another model
        self.settings = s = EMMSettings.of(config)
        if not s.sources:
            raise UserError("model.from: name runs of trained single-task models, at least one of each task")
        if s.tables != "new" and config.interaction != {"name": "concat"}:
            raise UserError(
                "model.interaction: the trained models bring theirs; leave it out, or set model.fusion.tables=new"
            )
        if sequences := list(sequences_of(schema)):
            raise UserError(
                f"bag {sequences[0]}: fusion emm reads no sequences; set pooling: mean, or choose another fusion"
            )
        if managed := managed_tables(schema):
            raise UserError(
                f"table {next(iter(managed))}: fusion emm supports no managed ids; choose another fusion, or set hash"
            )
        self.schema, self.managed = schema, None
        theirs = [Reader(schema, encoders, source.model, config.input_dropout) for source in s.sources]
        one = [Reader(schema, encoders, config, config.input_dropout)]
        self.readers = nn.ModuleList(one if s.tables == "new" else theirs)
        self._build_tables(encoders, config, device)
        tasks = list(schema.tasks)
        models = [
            TrainedModel(
                source.name,
                tasks.index(source.task),
                reader.out_dim,
                [layer.width for layer in source.chain],
                source.tower,
            )
            for source, reader in zip(s.sources, theirs, strict=True)
        ]
        in_dim = sum(reader.out_dim for reader in self._readers())
        self.fusion = EMM(in_dim, len(tasks), models, s.tables == "new", s.merge, s.projection)
        self.place_heads(schema, encoders, config)
        self.towers = self._towers(config)
        if s.trained:
            self.fusion.freeze()
        self.frozen_tables = s.trained and s.tables == "frozen"
        if self.frozen_tables:
            self.readers.requires_grad_(False)

    def _build_tables(self, encoders: Encoders, config: ModelConfig, device: str) -> None:
        suffixes = [""] if self.settings.tables == "new" else [f"@{m}" for m in range(len(self.readers))]
        tables_M = [table_configs(self.schema, encoders, config.embedding_std, suffix) for suffix in suffixes]
        pooled = [t for tables in tables_M for t in tables]
        self.embeddings, self.unpooled = EmbeddingBagCollection(pooled, device=torch.device(device)), None
        self.tables = list(pooled)
        self.features, self.bags, self.lengths = [], {}, {}
        for tables in tables_M:
            table = {feature: t.name for t in tables for feature in t.feature_names}
            # TorchRec names a feature that is looked up in several tables FEATURE@TABLE.
            name = {feature: f"{feature}@{table[feature]}" if len(tables_M) > 1 else feature for feature in table}
            self.features += [name[feature] for feature in self.schema.sparse]
            self.bags |= {name[bag]: bag for bag in self.schema.lists}
        self.embedding_dim = sum(t.embedding_dim * len(t.feature_names) for t in tables_M[0])

    def _towers(self, config: ModelConfig) -> Towers:
        if self.settings.towers == "new":
            widths = widths_by_task(config.tower, list(self.schema.tasks))
            return build_towers(widths, self.fusion.out_dim, config.dropout, self.units.sizes)
        given = [name for name in self.schema.tasks if given_chain(self.schema.tasks, name)]
        if self.settings.trained and config.given.name == "dr" and given:
            raise UserError(
                f"model.given.name: dr needs a number of {given[0]}'s tower that its trained model does not have; set "
                "model.fusion.towers=new, or model.given.name=ipw"
            )
        widths = [self.fusion.remainders[m] for m in self._first_models()]
        return OwnTowers(self.fusion.out_dim, widths, config.dropout, self.units.sizes)

    def _first_models(self) -> list[int]:
        """Of each task, the model whose remainder its own tower is."""
        return [self.fusion.tasks.index(task) for task in range(len(self.schema.tasks))]

    def _readers(self) -> list[Reader]:
        return [reader for reader in self.readers if isinstance(reader, Reader)]

    def reads_features(self, _: str, __: Sequence[int], /) -> bool:
        """All of it does: each level reads the input again, in as many widths as there are models."""
        return True

    def read(self, embedding_BE: Tensor, batch: Batch) -> Tensor:
        """x_BD: the inputs of the trained models, concatenated; or the one that all read."""
        if self.frozen_tables:
            embedding_BE = embedding_BE.detach()
        width = self.embedding_dim
        x_M = [
            reader(embedding_BE[:, m * width : (m + 1) * width], batch.dense_BD)
            for m, reader in enumerate(self.readers)
        ]
        return torch.cat(x_M, 1)

    def source_names(self) -> list[dict[str, str]]:
        """For each trained model, names in this model's state to the names of the same tensors in its own.

        Empty where `trained` is False.
        """
        return [
            self._names_of_source(m, source) for m, source in enumerate(self.settings.sources) if self.settings.trained
        ]

    def _names_of_source(self, m: int, source: Source) -> dict[str, str]:
        names = {}
        if self.settings.tables != "new":
            names = {f"readers.{m}.{name}": name for name in self.readers[m].state_dict()}
            for table in {self.schema.table_of(feature) for feature in self.schema.sparse}:
                names[table_weight(f"{table}@{m}")] = table_weight(table)
        ours = [
            f"fusion.levels.{level}.components.{m}.layers.{k}"
            for level, widths in enumerate(self.fusion.widths[m])
            for k in range(len(widths))
        ]
        task = self.fusion.tasks[m]
        theirs = source.layer_names
        if self.settings.towers == "own" and m == self._first_models()[task]:
            ours += [f"towers.tasks.{task}.hidden.layers.{k}" for k in range(len(self.fusion.remainders[m]))]
            ours, theirs = [*ours, f"towers.tasks.{task}.out"], [*theirs, "towers.out"]
        pairs = zip(ours, theirs, strict=False)  # layers above the last cut are not used
        return names | {
            f"{our}.{part}": f"{their}.{part}" for our, their in pairs for part in ("weight_SDH", "bias_SH")
        }


def build_ranker(schema: Schema, encoders: Encoders, config: ModelConfig, device: str = "meta") -> Ranker:
    """The ranker of a configuration: fused from trained models, or all other kinds. Arguments and errors as Ranker's."""
    kind = FusedRanker if config.fusion.get("name") == "emm" else Ranker
    return kind(schema, encoders, config, device)
