"""Sequences: what they become, against loops over rows and items, and what must hold of every model that has some."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import Sizes, check, check_gates, close, drawn_sizes, randomised, rows, widths
from references import sequences as references
from small_architecture import small_supernet, with_architecture
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from features.batch import Batch
from features.errors import UserError
from features.schema.schema import Schema
from models.emm import build_ranker
from models.fusion import FUSIONS
from models.fusion.dtrn import DTRN
from models.ranker import ModelConfig, Ranker
from models.sequences import Sequences, WithItems

# Shapes: B rows, T tasks, F features, J sequences, L items of the longest, D width of an item, W of a token.
MODELS = Path(__file__).parents[2] / "jobs/conf/model"
SCHEMA = yaml.safe_load("""
source: {files: "*.csv", types: {click: int, buy: int}}
tables:
  item: {dim: 4, hash: 11}
dense: {age: {}}
categorical:
  user: {dim: 4, hash: 7}
  shown: {table: item}
  beside: {table: item}
bag:
  met: {table: item, max_length: 3}
  recent: {table: item, max_length: 4, pooling: sequence}
  topics: {dim: 4, hash: 5}
  words: {dim: 4, hash: 9, max_length: 2, pooling: sequence}
tasks:
  click: {kind: binary, label: click}
  buy: {kind: binary, label: buy}
split: {by: row_index, modulo: 10, train: [0, 1, 2, 3, 4, 5, 6, 7], valid: [8], test: [9]}
""")
ENCODERS = SimpleNamespace(
    edges={}, labels={}, num_embeddings={"item": 11, "user": 7, "topics": 5, "words": 9}.__getitem__
)
# What three rows hold; the last is padding, which has no ids.
IDS = {
    "user": [[3], [6], []],
    "shown": [[2], [10], []],
    "beside": [[0], [1], []],
    "met": [[], [4, 4, 9], []],
    "recent": [[2, 5, 7, 1], [], []],
    "topics": [[1], [4, 0], []],
    "words": [[8], [3, 6], []],
}
SOURCE = {"run": "r", "step": 1, "task": "click", "model": {"fusion": {"name": "shared_bottom", "widths": [3]}}}
sizes = drawn_sizes(
    W=st.integers(1, 3), F=st.integers(1, 4), hidden=st.integers(1, 3), squeeze=st.integers(1, 3),
    condition=st.integers(1, 3), widths=widths, behaviours=st.none() | st.sets(st.integers(0, 3)),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3), candidates=st.sets(st.integers(0, 2)),
    sequences=st.sets(st.integers(0, 3), min_size=1),
)  # fmt: skip


class Called:
    """A module under a call of another form, for `check`."""

    def __init__(self, module: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        self.named_parameters, self.call = module.named_parameters, call

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)


def batch(ids: dict[str, list[list[int]]] = IDS) -> Batch:
    size = len(ids["user"])
    sparse = KeyedJaggedTensor(
        keys=list(ids),
        values=torch.tensor([i for own in ids.values() for row in own for i in row]),
        lengths=torch.tensor([len(row) for own in ids.values() for row in own]),
        stride=size,
    )
    one_BT = torch.ones(size, 2)
    return Batch(sparse, torch.randn(size, 1), one_BT, one_BT.bool(), one_BT, torch.arange(size))


def ranker(fusion: dict[str, Any] | None = None, schema: Schema | None = None, **config: Any) -> Ranker:
    torch.manual_seed(1)
    fusion = fusion or {"name": "shared_bottom", "widths": [3]}
    settings = ModelConfig(fusion=fusion, tower=[16], embedding_std=1.0, **config)
    return build_ranker(schema or Schema.parse(SCHEMA, "small.yaml"), ENCODERS, settings, device="cpu")


# What the tables give, against loops


def table(model: Ranker, name: str) -> Tensor:
    return next(v for n, v in model.state_dict().items() if n.endswith(f".{name}.weight"))


def looked_up(model: Ranker, name: str, row: int) -> Tensor:
    return table(model, "item" if name in ("shown", "beside", "met", "recent") else name)[IDS[name][row]]


def test_tables_that_a_sequence_reads_are_looked_up_item_by_item_and_the_others_keep_their_names():
    names = [name for name in ranker().state_dict() if name.endswith((".item.weight", ".words.weight", ".user.weight"))]
    assert sorted(names) == [
        "embeddings.embedding_bags.user.weight",
        "unpooled.embeddings.item.weight",
        "unpooled.embeddings.words.weight",
    ]
    plain = SCHEMA | {"bag": {name: own | {"pooling": "mean"} for name, own in SCHEMA["bag"].items()}}
    left_out = {name: {k: v for k, v in own.items() if k != "pooling"} for name, own in SCHEMA["bag"].items()}
    schemas = [Schema.parse(keys, "small.yaml") for keys in (plain, SCHEMA | {"bag": left_out}, SCHEMA)]
    assert schemas[0].fingerprint == schemas[1].fingerprint != schemas[2].fingerprint
    model = ranker(schema=schemas[0])
    assert not [name for name in model.state_dict() if "unpooled" in name or "sequences" in name]


def test_what_the_tables_give_is_means_then_items_then_how_many_there_are_whatever_the_table():
    model = ranker()
    embedding_BE = model.embedded(batch())
    for row in range(3):
        wanted: list[float] = []
        for name in ("user", "shown", "beside", "met", "topics"):
            found = looked_up(model, name, row)
            wanted += (found.sum(0) / max(len(found), 1)).tolist()
        for name in ("recent", "words"):
            items = looked_up(model, name, row).flatten().tolist()
            wanted += items + [0.0] * (16 - len(items))
        wanted += [len(IDS["recent"][row]), len(IDS["words"][row])]
        assert embedding_BE[row].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_input_has_each_sequence_as_din_pools_it_with_the_first_feature_of_its_table_as_candidate():
    model = ranker()
    x_BD, given = model.inputs(given_batch := batch()), given_batch.dense_BD
    params = dict(model.sequences.named_parameters())
    for row in range(3):
        candidate = looked_up(model, "shown", row).sum(0)
        recent = references.pooled(params, 0, list(looked_up(model, "recent", row)), candidate)
        words = references.pooled(params, 1, list(looked_up(model, "words", row)), torch.zeros(4))
        torch.testing.assert_close(x_BD[row, 20:28], torch.cat([recent, words]))
        assert x_BD[row, 28] == given[row, 0]
    # Where features lie in x is told to interactions and to those that attend, in the schema's order.
    assert list(model.numbers.columns) == [*IDS, "age"]
    places = {"user": (0, 4), "recent": (20, 24), "topics": (16, 20), "words": (24, 28), "age": (28, 29)}
    assert {name: model.numbers.columns[name] for name in places} == {n: [*range(*p)] for n, p in places.items()}


def test_a_schema_whose_tables_are_all_read_by_sequences_has_no_other_collection():
    few = SCHEMA | {"categorical": {"shown": {"table": "item"}}, "bag": {"recent": SCHEMA["bag"]["recent"]}}
    model = ranker(schema=Schema.parse(few, "small.yaml"))
    assert model.embeddings is None
    ids = {"shown": IDS["shown"], "recent": IDS["recent"]}
    assert model(batch(ids | {"user": IDS["user"]})).isfinite().all()


# The modules against their references


def layout(size: Sizes) -> Schema:
    """A sequence a table, with a candidate for some, behind another feature."""
    names = [str(j) for j in range(len(size.lengths))]
    keys = {
        "tables": {f"t{n}": {"dim": size.D, "hash": 5} for n in names},
        "categorical": {
            "other": {"dim": 4, "hash": 3},
            **{f"c{n}": {"table": f"t{n}"} for n in names if int(n) in size.candidates},
        },
        "bag": {
            f"s{n}": {"table": f"t{n}", "max_length": length, "pooling": "sequence"}
            for n, length in zip(names, size.lengths, strict=True)
        },
    }
    return Schema.parse(SCHEMA | keys, "small.yaml")


def counts(size: Sizes) -> list[list[int]]:
    """count_BJ, none and all among them."""
    rng = torch.Generator().manual_seed(size.seed)
    return [[int(torch.randint(0, length + 1, (), generator=rng)) for length in size.lengths] for _ in range(size.B)]


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_sequences_equal_their_reference_with_and_without_a_candidate(size):
    size = Sizes(**vars(size) | {"D": 4 * size.D})  # widths that tables may have
    module, count_BJ = randomised(Sequences(layout(size), size.W), size.seed), counts(size)
    own = [j for j in range(len(size.lengths)) if j in size.candidates]
    pooled, longest = 4 + len(own) * size.D, max(size.lengths)
    x_BE = rows(size, pooled + len(size.lengths) * longest * size.D)

    def call(x_BE: Tensor) -> Tensor:
        embedding_BE, item_BJLW, present_BJL = module(torch.cat([x_BE, torch.tensor(count_BJ).double()], 1))
        assert present_BJL.sum(2).tolist() == count_BJ
        return torch.cat([embedding_BE, (item_BJLW * present_BJL.unsqueeze(3)).flatten(1)], 1)

    def twin(params: dict[str, Tensor], x_BE: Tensor) -> Tensor:
        outputs = []
        for x_E, count_J in zip(x_BE, count_BJ, strict=True):
            vectors, tokens = [x_E[:pooled]], []
            for j, count in enumerate(count_J):
                place = pooled + j * longest * size.D
                items = [x_E[place + i * size.D : place + (i + 1) * size.D] for i in range(longest)]
                first = 4 + own.index(j) * size.D if j in own else None
                candidate_D = torch.zeros_like(items[0]) if first is None else x_E[first : first + size.D]
                vectors.append(references.pooled(params, j, items[:count], candidate_D))
                for place, item_D in enumerate(items):
                    token_W = item_D @ params["tokens.weight_SDH"][j] + params["tokens.bias_SH"][j]
                    tokens.append(token_W if place < count else torch.zeros_like(token_W))
            outputs.append(torch.cat([*vectors, *tokens]))
        return torch.stack(outputs)

    check(Called(module, call), twin, x_BE)


def fields(size: Sizes) -> list[int]:
    return sorted(f for f in size.sequences if f < size.F) or [0]


def dtrn(size: Sizes) -> tuple[DTRN, list[int]]:
    """With the fields that are its behaviours."""
    lengths = {field: 1 + field % 3 for field in fields(size)}
    given_by_name = (
        None if size.behaviours is None else sorted((f for f in size.behaviours if f < size.F), reverse=True)
    )
    inner = (size.widths, given_by_name, size.condition, size.hidden, size.squeeze)
    module = randomised(DTRN(size.D, size.T, size.F, lengths, *inner), size.seed)
    return module, list(lengths) if given_by_name is None else given_by_name


def taken_apart(size: Sizes, x_BE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_BFW, item_BJLW and present_BJL."""
    lengths = [1 + field % 3 for field in fields(size)]
    x_BFW, item_BJLW = (
        x_BE[:, : size.F * size.D].unflatten(1, (size.F, size.D)),
        x_BE[:, size.F * size.D :].unflatten(1, (len(lengths), max(lengths), size.D)),
    )
    drawn = counts(Sizes(B=size.B, seed=size.seed, lengths=lengths))
    return x_BFW, item_BJLW, torch.arange(max(lengths)) < torch.tensor(drawn).unsqueeze(2)


def all_of(size: Sizes) -> Tensor:
    lengths = [1 + field % 3 for field in fields(size)]
    return rows(size, (size.F + len(lengths) * max(lengths)) * size.D)


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_dtrn_equals_its_reference_where_behaviours_are_sequences(size):
    module, behaviours = dtrn(size)

    def twin(params: dict[str, Tensor], x_BE: Tensor) -> tuple[Tensor, list[Tensor]]:
        x_BFW, item_BJLW, present_BJL = taken_apart(size, x_BE)
        items_BJ = [
            [own[there] for own, there in zip(*row, strict=True)] for row in zip(item_BJLW, present_BJL, strict=True)
        ]
        return references.dtrn(params, x_BFW, items_BJ, size.T, size.widths, behaviours, fields(size))

    x_BE = all_of(size)
    check(Called(module, lambda x: module(WithItems(*taken_apart(size, x)))), lambda *call: twin(*call)[0], x_BE)
    gates = module.gates(WithItems(*taken_apart(size, x_BE)))
    check_gates(gates, twin(dict(module.named_parameters()), x_BE)[1])


@settings(max_examples=examples(20), deadline=None)
@given(sizes, st.floats(-1e3, 1e3))
def test_what_stands_in_places_without_an_item_changes_nothing(size, anything):
    module, _ = dtrn(size)
    x_BFW, item_BJLW, present_BJL = taken_apart(size, all_of(size))
    other_BJLW = torch.where(present_BJL.unsqueeze(3), item_BJLW, anything)
    close(module(WithItems(x_BFW, other_BJLW, present_BJL)), module(WithItems(x_BFW, item_BJLW, present_BJL)))


def test_dtrn_reads_items_in_their_order_and_its_tasks_read_them_differently():
    module = randomised(DTRN(4, 3, 2, {1: 5}, [3], hidden=16), 3)
    size = Sizes(B=4, D=4, seed=2)
    x_BFW, item_BJLW, present_BJL = rows(size, 2, 4), rows(size, 1, 5, 4), torch.ones(4, 1, 5, dtype=torch.bool)
    read = module._read(WithItems(x_BFW, item_BJLW, present_BJL))
    turned = module._read(WithItems(x_BFW, item_BJLW.flip(2), present_BJL))
    assert torch.equal(read[:, :, 0], turned[:, :, 0])
    assert not torch.isclose(read[:, :, 1], turned[:, :, 1]).all(2).any()
    assert not torch.isclose(read[0, :, 1], read[1, :, 1]).all(1).any()
    pooled = randomised(DTRN(4, 3, 2, {}, [3], [1], hidden=16), 3)
    assert pooled.interests.attention is None


# Every model


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(MODELS.glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        if config["fusion"]["name"] not in ("emm", "aitm", "stem"):
            yield path.stem, with_architecture(config, ["click", "buy"])
    yield "automtl_supernet", {"fusion": small_supernet()}
    yield "aitm", {"fusion": {"name": "aitm", "widths": [16], "chain": ["click", "buy"]}}


@pytest.mark.parametrize(("name", "config"), configs())
def test_every_model_reads_a_schema_with_sequences_and_all_its_weights_learn_from_it(name, config):
    config = {key: value for key, value in config.items() if key in ("fusion", "interaction", "field_dim")}
    model, given = ranker(**config), batch()
    logit_BT = model(given)
    assert logit_BT.shape == (3, 2)
    logit_BT.square().sum().backward()
    unlearnt = [
        n for n, p in model.named_parameters() if n.startswith(("sequences.", "unpooled.")) and not p.grad.any()
    ]
    assert unlearnt == []
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(given).float(), logit_BT, rtol=0.1, atol=0.1)
    assert ("sequences.tokens.weight_SDH" in model.state_dict()) == FUSIONS[config["fusion"]["name"]].sequences


def learnable(count: int, seed: int) -> tuple[Batch, Tensor]:
    """Rows whose label is, with noise, whether the item shown has been met before; with the best NE that there can be."""
    rng = torch.Generator().manual_seed(seed)
    met_BL, number_B = torch.randint(0, 11, (count, 4), generator=rng), torch.randint(0, 5, (count,), generator=rng)
    present_BL, shown_B = torch.arange(4) < number_B.unsqueeze(1), torch.randint(0, 11, (count,), generator=rng)
    probability_B = torch.where(((met_BL == shown_B.unsqueeze(1)) & present_BL).any(1), 0.9, 0.1)
    label_B = torch.bernoulli(probability_B, generator=rng)
    lengths = {"user": 1, "shown": 1, "beside": 1, "met": 0, "recent": number_B, "topics": 0, "words": 0}
    sparse = KeyedJaggedTensor(
        keys=list(lengths),
        values=torch.cat(
            [torch.zeros(count, dtype=torch.int64), shown_B, torch.zeros_like(shown_B), met_BL[present_BL]]
        ),
        lengths=torch.cat([torch.as_tensor(own).expand(count) for own in lengths.values()]),
        stride=count,
    )
    one_BT = torch.ones(count, 2)
    label_BT = label_B.unsqueeze(1).expand(-1, 2)
    made = Batch(sparse, torch.zeros(count, 1), label_BT, one_BT.bool(), one_BT, torch.arange(count))
    return made, normalized_entropy(probability_B.logit(), label_B)


def normalized_entropy(logit_B: Tensor, label_B: Tensor) -> Tensor:
    share = label_B.mean()
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    return nn.functional.binary_cross_entropy_with_logits(logit_B, label_B) / entropy


def trained(fusion: dict[str, Any], pooling: str) -> float:
    """NE of the first task on new rows after 240 steps."""
    bags = {name: own | ({"pooling": pooling} if name == "recent" else {}) for name, own in SCHEMA["bag"].items()}
    model = ranker(fusion, Schema.parse(SCHEMA | {"bag": bags}, "small.yaml"), field_dim=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(240):
        rows_of_step, _ = learnable(128, step)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(rows_of_step), rows_of_step.label_BT).backward()
        optimizer.step()
    new, _ = learnable(2048, 1000)
    with torch.no_grad():
        return normalized_entropy(model(new)[:, 0], new.label_BT[:, 0]).item()


@pytest.mark.integration
def test_models_learn_whether_what_is_shown_was_met_before_from_a_sequence_but_not_from_a_mean():
    best = learnable(2048, 1000)[1].item()
    plain, dtrn = {"name": "shared_bottom", "widths": [16]}, {"name": "dtrn", "widths": [16], "hidden": 8}
    room = trained(plain, "mean") - best
    assert trained(plain, "sequence") - best < 0.5 * room
    assert trained(dtrn, "sequence") - best < 0.5 * room


# What is refused


@pytest.mark.parametrize(
    ("change", "fusion", "words"),
    [
        ({"words": {"dim": 12, "hash": 9, "pooling": "sequence"}}, None, ["item, words", "dim 4, 12"]),
        ({}, {"name": "emm", "sources": [SOURCE]}, ["recent", "pooling: mean"]),
        ({}, {"name": "dtrn", "widths": [3], "sequences": {}}, ["model.fusion.sequences"]),
    ],
)
def test_what_sequences_do_not_go_with_is_said_in_one_line(change, fusion, words):
    with pytest.raises(UserError) as caught:
        ranker(fusion, Schema.parse(SCHEMA | {"bag": SCHEMA["bag"] | change}, "small.yaml"))
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_pooling_that_does_not_exist_is_refused_with_what_is_allowed():
    bag = SCHEMA["bag"] | {"recent": {"table": "item", "pooling": "max"}}
    with pytest.raises(UserError, match=r"bag\.recent\.pooling.*'mean' or 'sequence'"):
        Schema.parse(SCHEMA | {"bag": bag}, "small.yaml")
