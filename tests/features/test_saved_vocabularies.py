"""Vocabularies of saved encoders: opened by their footers, and read when a value or a count is first used."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_by_hand import SCHEMA, draw_rows, fit_encoders
from memory import memory_below

from features.errors import UserError
from features.fit import fitted_files
from features.fit.encoders import Encoders

CITY = "vocabularies/city.parquet"
VALUES = 300_000
ROWS = draw_rows(200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fit_encoders(ROWS)[0].save(tmp_path / "encoders")
    return tmp_path / "encoders"


def test_encoders_that_were_opened_are_those_that_were_loaded(folder: Path) -> None:
    opened, loaded = Encoders.open(folder, SCHEMA), Encoders.load(folder, SCHEMA)
    assert opened.encode(ROWS) == loaded.encode(ROWS)
    assert dict(opened.vocabularies) == loaded.vocabularies
    assert {name: count_V.tolist() for name, count_V in opened.counts.items()} == {
        name: count_V.tolist() for name, count_V in loaded.counts.items()
    }
    assert opened.unknown_ids("city") == loaded.unknown_ids("city")
    again = pickle.loads(pickle.dumps(Encoders.open(folder, SCHEMA)))
    assert again.vocabularies["city"] == loaded.vocabularies["city"]


def test_sizes_of_tables_take_no_memory_of_their_values(folder: Path) -> None:
    known = Encoders.load(folder, SCHEMA)
    values = pa.array(np.arange(VALUES)).cast(pa.large_string())
    many = Encoders(SCHEMA, {**known.vocabularies, "city": values}, known.moments, known.edges, known.missing)
    large = folder.parent / "large"
    many.save(large)
    del many
    before = pa.total_allocated_bytes()
    with memory_below(1 << 20):
        encoders = Encoders.open(large, SCHEMA)
        assert encoders.num_embeddings("city") == VALUES + 2
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert encoders.vocabularies["city"] == values
    assert pa.total_allocated_bytes() - before > 8 * VALUES


def test_a_file_is_read_once_for_its_values_and_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, read = Encoders.open(folder, SCHEMA), []
    real = fitted_files.read_vocabulary

    def counted(folder: Path, table: str, size: int) -> tuple[pa.Array, np.ndarray]:
        read.append(table)
        return real(folder, table, size)

    monkeypatch.setattr(fitted_files, "read_vocabulary", counted)
    assert len(encoders.counts["city"]) == len(encoders.vocabularies["city"])
    assert read == ["city"]


def test_a_file_of_another_size_is_refused_at_once_and_a_damaged_one_when_it_is_used(folder: Path) -> None:
    content = bytearray((folder / CITY).read_bytes())
    pq.write_table(pq.read_table(folder / CITY).slice(1), folder / CITY)
    with pytest.raises(UserError, match="does not hold the"):
        Encoders.open(folder, SCHEMA)
    (folder / CITY).unlink()
    with pytest.raises(UserError, match="is missing"):
        Encoders.open(folder, SCHEMA)
    content[4:40] = bytes(36)  # the first page's header
    (folder / CITY).write_bytes(content)
    opened = Encoders.open(folder, SCHEMA)
    with pytest.raises(UserError, match=r"city\.parquet"):
        opened.encode(ROWS)
