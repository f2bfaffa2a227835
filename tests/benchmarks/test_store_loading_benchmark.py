"""The benchmark of loading from a store in a small form."""

import re
from pathlib import Path

import psutil
import store_loading
from loading import Sizes, write_dataset
from s3_server import S3Server

from pipeline.storage.store_path import StorePath


def test_it_reads_the_same_rows_from_disk_store_and_cache(tmp_path: Path, s3: StorePath, s3_server: S3Server) -> None:
    local = write_dataset(tmp_path / "data", Sizes(600, 100, 3, 2, 2))
    stored = store_loading.copied(local, str(s3))
    assert s3_server.process is not None
    process = psutil.Process(s3_server.process.pid)
    lines = store_loading.compare(local, stored, tmp_path / "cache", 0, 2, process).splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == ["disk", "S3", "S3, cache full"]
    assert all(re.search(r"\d,?\d+ +\d\.\d{3} ", line) for line in lines)
    assert len([*(tmp_path / "cache").iterdir()]) == 8  # six row groups in two shards
