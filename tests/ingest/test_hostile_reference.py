"""Datasets whose encoders are used for another one: only the files of encoders are copied, and nothing that a link leads to."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.errors import UserError
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import fitted_names
from pipeline.dataset.verify import verify
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess

pytestmark = pytest.mark.integration
SCHEMA = Callable[[], dict[str, Any]]


@pytest.fixture
def reference(small_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_dataset, tmp_path / "reference"))


def run(log: Path, out: Path, content: dict[str, Any], **more: Any) -> None:
    preprocess(PreprocessConfig(input=str(log), out=out, **more), Schema.parse(content, where="small.yaml"))


def refused(log: Path, out: Path, content: dict[str, Any], **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(log, out, content, **more)
    assert "\n" not in str(caught.value)
    assert not [path for path in out.parent.glob(f"{out.name}*") if path.name.startswith(f"{out.name}.staging")]
    return str(caught.value)


def test_encoders_of_another_dataset_are_copied_with_nothing_beside_them(reference, small_log, small_content, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (reference / "encoders/notes").symlink_to(secret)
    (reference / "encoders/zero").symlink_to("/dev/zero")
    os.mkfifo(reference / "encoders/pipe")
    (reference / "encoders/vocabularies/more.parquet").symlink_to(secret)
    out = tmp_path / "out"
    run(small_log, out, small_content(), encoders={"from": reference})
    schema = Dataset(out).schema
    names = [name for name in fitted_names(schema) if name.startswith("encoders/")]
    found = sorted(path.relative_to(out).as_posix() for path in (out / "encoders").rglob("*") if not path.is_dir())
    assert found == sorted(names)
    assert all((out / name).read_bytes() == (reference / name).read_bytes() for name in names)
    assert not any((out / name).is_symlink() for name in names)
    assert len(list(verify(Dataset(out)))) == 8
    with pytest.raises(UserError, match="does not name this file"):
        list(verify(Dataset(reference)))


@pytest.mark.parametrize("name", ["encoders", "encoders/vocabularies", "encoders/encoders.json",
                                  "encoders/vocabularies/city.parquet", "statistics.json", "schema.yaml"])  # fmt: skip
@pytest.mark.parametrize("target", ["moved", "/dev/zero"])
def test_a_link_in_place_of_encoders_is_not_followed(reference, small_log, small_content, tmp_path, name, target):
    (reference / name).rename(tmp_path / "moved")
    (reference / name).symlink_to(tmp_path / "moved" if target == "moved" else target)
    assert "link" in refused(small_log, tmp_path / "out", small_content(), encoders={"from": reference})
    assert not (tmp_path / "out").exists()


def test_a_dataset_lists_its_encoders_and_statistics_and_one_of_an_earlier_release_need_not(small_dataset, tmp_path):
    manifest = json.loads((small_dataset / "manifest.json").read_text())
    assert [file["path"] for file in manifest["fitted"]] == fitted_names(Dataset(small_dataset).schema)
    old = Path(shutil.copytree(small_dataset, tmp_path / "old"))
    del manifest["fitted"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert Dataset(old).encoders_id == Dataset(small_dataset).encoders_id
    assert len(list(verify(Dataset(old)))) == 8


def test_a_day_that_is_a_link_is_neither_replaced_nor_taken_encoders_from(small_log, small_content, tmp_path):
    log, out = tmp_path / "log", tmp_path / "days"
    log.mkdir()
    for day in (1, 2):
        shutil.copy(small_log / "impressions-1.csv", log / f"impressions-1970-01-0{day}.csv")
        shutil.copy(small_log / "clicks-2.csv", log / f"clicks-1970-01-0{day}.csv")
    content = small_content()
    content["source"]["files"] = "impressions-{date}.csv"
    content["source"]["outcomes"]["click"]["files"] = "clicks-{date}.csv"
    content["source"]["outcomes"]["click"]["window"] = "1h"
    content["event_time"], content["split"] = "at", {"by": "hash", "key": "id", "valid": 0.2, "test": 0.2}
    content["source"]["outcomes"]["click"]["time"] = "at"
    (tmp_path / "elsewhere").mkdir()
    out.mkdir()
    (out / "1970-01-01").symlink_to(tmp_path / "elsewhere")
    settings = {"date": "1970-01-01", "overwrite": True, "max_bad_fraction": 1}
    assert "1970-01-01 is a link" in refused(log, out, content, **settings)
    assert not list((tmp_path / "elsewhere").iterdir())
