"""Vectors: cases of test_kinds, hypothesis against plain loops, and a tiny ingest and training step with one."""

import csv
import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_case import Case

from features.errors import UserError
from features.kinds.vector import Vector
from features.schema.schema import Schema
from models.losses import TaskLoss
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.card.card import read_card
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.dataset.verify import verify
from pipeline.evaluation.trees import boosted_trees
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess

BAD = {
    1: "x: 1 numbers, it must have 3",
    3: "x: 4 numbers, it must have 3",
    4: "x: 'two' is not a finite number",
    5: "x: 'nan' is not a finite number",
    6: "x: '1e39' is not a finite number",
    7: "x: '' is not a finite number",
}
TEXTS = ["1,-2.5,0", "7", None, "1,2,3,4", "1,two,inf", "1,2,nan", "1e39,0,0", "1,,2", " 4, 5e-1 ,6"]
LISTS = [text.split(",") if text else None for text in TEXTS]
ROWS = [[1.0, -2.5, 0.0], [0.0, 0.0, 0.0], [4.0, 0.5, 6.0]]
CASES = [
    Case({"length": 3}, TEXTS, BAD, 1, dense=ROWS),
    Case({"length": 3, "separator": "; "}, [t and t.replace(",", "; ") for t in TEXTS], BAD, 1, dense=ROWS),
    Case({"length": 3, "missing_flag": True}, LISTS, BAD, 1, dense=[[*row, float(not any(row))] for row in ROWS]),
    Case({"length": 1}, ["3", None, "4"], {}, 1, dense=[[3.0], [0.0], [4.0]]),
]

ITEM = st.floats(width=32).map(str) | st.sampled_from(["", "x", "1e39", " 2 ", "1e-50"])
CELL = st.none() | st.lists(ITEM, max_size=4)


def plain(name: str, cell: list[str] | None, length: int) -> tuple[list[float] | None, str | None]:
    if cell is None:
        return None, None
    if len(cell) != length:
        return None, f"{name}: {len(cell)} numbers, it must have {length}"
    numbers = []
    for text in cell:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not abs(number) <= float(np.finfo(np.float32).max):
            return None, f"{name}: '{text}' is not a finite number"
        numbers.append(float(np.float32(number)))
    return numbers, None


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(CELL, max_size=8), st.integers(1, 3), st.integers(0, 2))
def test_lists_are_parsed_as_a_loop_parses_them(cells, length, start):
    array = pa.array(cells, pa.list_(pa.string())).slice(start)
    found, reason = Vector(length=length).parse("v", array, None)
    expected = [plain("v", cell, length) for cell in cells[start:]]
    assert (reason.to_list() if reason is not None else [None] * len(expected)) == [why for _, why in expected]
    for row, (numbers, why) in zip(found.to_pylist(), expected, strict=True):
        assert why or row == numbers


def test_a_list_of_numbers_of_a_derived_column_is_a_vector_too():
    found, reason = Vector(length=2).parse("v", pa.array([[0.1, 2.0], None]), None)
    assert reason is None
    assert found.to_pylist() == [[float(np.float32(0.1)), 2.0], None]


def test_settings_are_checked_as_those_of_other_kinds(small_content):
    content = small_content()
    content["vector"] = {"image": {"length": 0}}
    with pytest.raises(UserError, match=r"vector.image.length: .*greater than or equal to 1"):
        Schema.parse(content, "mine.yaml")
    content["vector"] = {"image": {"length": 2, "size": 3}}
    with pytest.raises(UserError, match=r"vector.image.size: unknown key, allowed are .*length, separator"):
        Schema.parse(content, "mine.yaml")
    content["vector"] = {"price": {"length": 2}}
    with pytest.raises(UserError, match="feature price is defined twice"):
        Schema.parse(content, "mine.yaml")
    content["vector"] = {"image": {"length": 2, "column": "qty"}}
    with pytest.raises(UserError, match=r"tasks.bought.label uses column qty, which is also read by the feature image"):
        Schema.parse(content, "mine.yaml")


def test_a_vector_is_part_of_both_fingerprints_and_so_is_its_place(small_content):
    contents = [
        {},
        {"a": {"length": 2}, "b": {"length": 2}},
        {"b": {"length": 2}, "a": {"length": 2}},
        {"a": {"length": 3}, "b": {"length": 2}},
    ]
    schemas = [Schema.parse(small_content() | {"vector": vector}, "mine.yaml") for vector in contents]
    assert len({schema.fingerprint for schema in schemas}) == len({s.inputs_fingerprint for s in schemas}) == 4
    assert schemas[0].fingerprint == Schema.parse(small_content(), "mine.yaml").fingerprint


def image(number: int) -> list[float] | None:
    """Of row `number` of the small log."""
    return None if number % 10 == 0 else [number / 100, -float(number % 3), 0.5, 1e-3 * number]


def write_log(source: Path, folder: Path, ending: str) -> int:
    """The small log with a column `image` of another format, in one file. Returns its rows, of which two are bad."""
    shutil.copytree(source, folder)
    rows = []
    for path in sorted(folder.glob("impressions-*")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            rows += csv.DictReader(file)
        path.unlink()
    images = [image(number) for number in range(len(rows))]
    images[7], images[8] = [1.0], [1.0, 2.0, math.inf, 4.0]
    if ending == "csv":
        with (folder / "impressions-1.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], "image"])
            writer.writeheader()
            writer.writerows(
                r | {"image": ",".join(map(str, i)) if i else ""} for r, i in zip(rows, images, strict=True)
            )
    elif ending == "jsonl":
        images[8] = ["1", "2", "inf", "4"]
        lines = [json.dumps(r | {"image": i}) for r, i in zip(rows, images, strict=True)]
        (folder / "impressions-1.jsonl").write_text("\n".join(lines) + "\n")
    else:
        columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
        pq.write_table(
            pa.table(columns | {"image": pa.array(images, pa.list_(pa.float32()))}), folder / "impressions-1"
        )
    return len(rows)


@pytest.fixture(scope="module", params=["csv", "jsonl", "parquet"])
def dataset(request, small_log, small_content, tmp_path_factory) -> Dataset:
    """The dataset of the small log with a vector."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = write_log(small_log, folder / "log", request.param)
    content = small_content() | {"vector": {"image": {"length": 4, "missing_flag": True}}}
    content["source"] |= {"format": request.param}
    content["source"]["outcomes"]["click"]["read"] = {"trim": True}
    config = PreprocessConfig(
        input=str(folder / "log"), out=folder / "dataset", rows_per_row_group=32, rows_per_shard=200,
        max_bad_fraction=0.01,
    )  # fmt: skip
    preprocess(config, Schema.parse(content, "small.yaml"))
    found = Dataset(folder / "dataset")
    assert sum(found.manifest.rows.values()) == rows - 2
    return found


@pytest.mark.integration
def test_a_vector_goes_from_a_log_through_ingest_and_loader_into_a_training_step(dataset):
    assert dataset.manifest.dead_letters == {"image: wrong value": 2}
    assert len(list(verify(dataset))) > 0
    assert read_card(dataset.path)["others"] == {"image": {"missing": pytest.approx(30 / 298)}}
    loader = Loader(dataset, "train", batch_size=50, window=64)
    columns, seen = list(dataset.schema.dense_ranges["image"]), 0
    for batch in loader.batches(loader.start()):
        for row_id, found in zip(batch.row_id_B.tolist(), batch.dense_BD[:, columns].tolist(), strict=True):
            if row_id >= 0:
                wanted = image(row_id - 1000)
                assert found == [float(np.float32(x)) for x in wanted or [0.0] * 4] + [float(wanted is None)]
                seen += 1
    assert seen == 298
    config = ModelConfig(interaction={"name": "dot"}, fusion={"name": "shared_bottom", "widths": [8]})
    ranker = Ranker(dataset.schema, dataset.encoders, config, device="cpu")
    tasks = dataset.schema.tasks.values()
    loss = TaskLoss([task.loss_weight for task in tasks])
    optimizer = torch.optim.SGD(ranker.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss_BT, _ = ranker.row_losses(ranker.outputs(batch), batch.label_BT, batch.observed_BT)
        weight_BT = batch.weight_BT * batch.observed_BT
        losses.append(loss(loss_BT, weight_BT, weight_BT.sum(0)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]


def test_boosted_trees_read_every_number_of_a_vector(dataset, tmp_path):
    only = dataset.only(["click"])
    assert boosted_trees(only, 200, 0, tmp_path / "predictions")["trees"]["click"] >= 1
