"""The same dataset, byte for byte, from workers on other hosts; hosts that are gone, or not what they should be."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ingest_runs import ENVIRONMENT, content_of, no_beam, run

POOL = [sys.executable, "-m", "pipeline.ingest.runners.pool"]
SIZES = {"rows_per_row_group": 32, "rows_per_shard": 100, "unit_bytes": 8000, "bucket_bytes": 20_000}


class Pool:
    """A worker pool in a process of its own, on a port that is free."""

    def __init__(self, *arguments: str, port: int = 0, **environment: str) -> None:
        command = [*POOL, f"--port={port}", *arguments]
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT | environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.line = self.process.stderr.readline()
        found = re.search(r"listening on \S+:(\d+)", self.line)
        assert found, self.line + self.process.stderr.read()
        self.port = int(found[1])
        self.address = f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        """Ends it and its workers, as a power cut does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def pools(count: int) -> Iterator[list[Pool]]:
    found = [Pool() for _ in range(count)]
    try:
        yield found
    finally:
        for pool in found:
            pool.kill()


@pytest.fixture(scope="module")
def in_a_loop(small_log, small_content, tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a dataset of several units, buckets and shards, made without Beam and other processes."""
    out = tmp_path_factory.mktemp("in_a_loop") / "out"
    with no_beam():
        run(small_log, out, small_content(), **SIZES)
    return content_of(out)


@pytest.mark.system
def test_two_pools_write_the_bytes_of_one_process(in_a_loop, small_log, small_content, tmp_path):
    with pools(2) as two:
        run(small_log, tmp_path / "out", small_content(), runner="hosts", hosts=[p.address for p in two], **SIZES)
    assert content_of(tmp_path / "out") == in_a_loop
