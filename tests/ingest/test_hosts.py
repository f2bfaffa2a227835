"""The same dataset, byte for byte, from workers on other hosts; hosts that are gone, or not what they should be."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import hosts_pool
import pytest
import yaml
from hosts import hosts, require_hosts
from ingest_runs import ENVIRONMENT, SMALL_SIZES, content_of, refused, run
from waiting import wait_for

from features.errors import UserError
from pipeline.ingest import progress, workers
from pipeline.ingest.messages import Failure
from pipeline.ingest.runners import handshake
from pipeline.ingest.runners import hosts as pools_of
from pipeline.ingest.runners.hosts import Pools, addresses
from pipeline.processes import has_ended

pytestmark = pytest.mark.system

SIZES = SMALL_SIZES
KEY = "a secret of all hosts"


class Pool:
    """A worker pool in a process of its own, on a free port."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, hosts_pool.__file__, "--port=0", *arguments]
        environment = ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def address(self) -> str:
        found = wait_for(lambda: re.search(r"listening on \S+:(\d+)", self.log), "a pool", 30)
        return f"127.0.0.1:{found[1]}"

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def started(*environments: dict[str, str]) -> Iterator[list[Pool]]:
    """Pools, a process each."""
    found = [Pool(**each) for each in environments]
    try:
        yield found
    finally:
        for pool in found:
            pool.kill()


@pytest.fixture(scope="module")
def two_pools() -> Iterator[list[Pool]]:
    with started({handshake.KEY_VARIABLE: KEY}, {handshake.KEY_VARIABLE: KEY}) as found:
        yield found


@pytest.fixture
def pools(two_pools, monkeypatch) -> list[Pool]:
    """Two pools, and their secret in this process."""
    monkeypatch.setenv(handshake.KEY_VARIABLE, KEY)
    return two_pools


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(pools_of.logger, "warning", lambda text, *values: found.append(text % values))
    return found


@contextmanager
def working(hosts: list[str], count: int = 1, files: Any = ()) -> Iterator[Pools]:
    """Workers that sleep."""
    found = Pools(addresses(hosts), count, hosts_pool.sleep, files)
    try:
        yield found
    finally:
        found.close()


# The same bytes


def test_pools_that_die_end_a_job_with_their_names_and_others_write_the_bytes_of_one_process_to_a_store(
    in_a_loop, small_log, small_content, tmp_path, monkeypatch, warnings, s3
):
    monkeypatch.setattr(pools_of, "RETURN_S", 0.5)
    with started({"ACCIDENT": "read:pool"}, {"ACCIDENT": "encode:pool"}) as two:
        both = [pool.address for pool in two]
        message = refused(small_log, tmp_path / "out", small_content(), runner="hosts", hosts=both, **SIZES)
    assert warnings[0].startswith(f"{both[0]}: a worker ended in step read (")  # and the other did its work
    assert message.startswith(f"hosts: no worker pool is left in step encode: {both[0]}: nothing listens there")
    assert f"{both[1]}: nothing listens there" in message
    assert message.endswith("Nothing was written: run again.")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "apache_beam.py").write_text("raise ImportError('pools need no Beam')")
    without = dict(os.environ) | {"PYTHONPATH": f"{tmp_path / 'without'}:{ENVIRONMENT['PYTHONPATH']}"}
    lines: list[str] = []
    monkeypatch.setattr(progress.logger, "info", lines.append)
    with started(without, without) as two:
        run(small_log, s3 / "out", small_content(), runner="hosts", hosts=[p.address for p in two], **SIZES)
    assert content_of(s3 / "out") == in_a_loop
    steps = ["read", "join", "label", "merge", "encode", "write"]
    assert list(dict.fromkeys(line[:8].strip() for line in lines)) == steps
    assert all(pool.log.count("started worker") == 1 for pool in two)
    assert not workers.RUNNING


def test_a_host_whose_link_is_cut_is_given_up_and_others_do_its_work(in_a_loop, small_log, small_content, tmp_path):
    require_hosts()
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(small_content(), sort_keys=False))
    code = f"""
import logging, sys, yaml
from pathlib import Path
from ingest_runs import run
from pipeline.ingest.runners import handshake, hosts
logging.basicConfig(format="%(message)s")
handshake.SILENCE_MS, handshake.PROBE_S, hosts.RETURN_S, hosts.CONNECT_S = 2000, 1, 1, 4
content = yaml.safe_load(open("schema.yaml"))
run({str(small_log)!r}, Path.cwd() / "out", content, runner="hosts", hosts=["h1:50000", "h2:50000"], **{SIZES})
"""
    environment = ENVIRONMENT | {handshake.KEY_VARIABLE: KEY}
    pool = [sys.executable, hosts_pool.__file__, "--host=0.0.0.0"]
    with hosts("job", "h1", "h2") as (job, h1, h2):
        h1.start(*pool, env=environment, stderr=subprocess.DEVNULL)
        h2.start(*pool, env=environment | {"ACCIDENT": f"read:silence:{tmp_path}/cut"}, stderr=subprocess.DEVNULL)
        for host in (h1, h2):
            probe = job.command("bash", "-c", f"echo > /dev/tcp/{host.name}/50000")
            wait_for(lambda command=probe: not subprocess.run(command, stderr=subprocess.DEVNULL).returncode, host.name)
        driver = job.start(sys.executable, "-c", code, env=environment, stderr=subprocess.PIPE, cwd=tmp_path)
        wait_for(lambda: (tmp_path / "cut").exists() or driver.poll() is not None, "the step", 30)
        h2.cut()
        error = driver.communicate(timeout=60)[1]
    assert driver.returncode == 0, error
    assert content_of(tmp_path / "out") == in_a_loop
    assert "h2:50000: a worker ended in step read (" in error


# How work is spread


def test_a_slow_piece_holds_nothing_up_and_all_workers_have_some(pools):
    with working([pool.address for pool in pools]) as both:
        warm = [both.submit("warm", number, 0.5) for number in range(2)]
        assert len({done.result(30).error for done in warm}) == 2
        slow = both.submit("spread", 0, 2)
        quick = {both.submit("spread", number, 0.01).result(30).error for number in range(1, 30)}
        assert not slow.done()
        assert slow.result(30).error not in quick


def test_a_piece_is_begun_once_however_often_beam_asks(pools):
    with working([pools[0].address]) as one:
        assert one.submit("step", 0, 0) is one.submit("step", 0, 0)


def test_workers_end_with_their_job(pools):
    with working([pools[0].address]) as one:
        pid = int(one.submit("step", 0, 0).result(30).error)
        one.submit("step", 1, 600)
        time.sleep(0.1)
    wait_for(lambda: has_ended(pid), "the worker's end", 5)


def test_work_that_ends_its_workers_is_given_up_with_where_they_were(pools, warnings):
    with working([pools[0].address, pools[1].address]) as both:
        report = both.submit("read", 7, "end").result(30)
        assert isinstance(report, Failure)
        assert report.error.startswith("3 workers ended with the same piece of step read (on 127.0.0.1:")
        assert both.submit("read", 8, 0).result(30).error.isdecimal()
    assert len(warnings) == 3


def test_work_that_comes_after_the_last_pool_is_gone_fails_too(monkeypatch):
    monkeypatch.setattr(pools_of, "RETURN_S", 0)
    with started({}) as [pool], working([pool.address]) as one:
        assert one.submit("read", 0, 0).result(30).error.isdecimal()
        pool.kill()
        for number in (1, 2):
            report = one.submit("join", number, 0).result(30)
            assert report.error.startswith(f"hosts: no worker pool is left in step join: {pool.address}: nothing")


# Pools that cannot be used


@contextmanager
def listening(answer: bytes) -> Iterator[str]:
    """A server that answers every connection with some bytes, and then says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return
                kept[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_all_pools_that_cannot_be_used_are_named_in_one_line(pools, small_log, small_content, tmp_path, monkeypatch):
    monkeypatch.setattr(pools_of, "CONNECT_S", 3.0)
    nobody = f"127.0.0.1:{free_port()}"
    with listening(b"") as silent, listening(b"HTTP/1.1 200 OK\r\n\r\n") as other:
        named = [nobody, silent, other, pools[0].address, "no.such.host.invalid:50000"]
        begin = time.monotonic()
        message = refused(small_log, tmp_path / "out", small_content(), runner="hosts", hosts=named)
    assert f"{nobody}: nothing listens there; start python -m" in message
    assert f"{silent} does not answer within 3 s" in message
    assert f"{other} is no worker pool of taskfuse" in message
    assert "no.such.host.invalid:50000: no such host" in message
    assert pools[0].address not in message
    assert time.monotonic() - begin < 25


def test_a_pool_with_another_secret_or_other_versions_or_without_the_files_is_refused(pools, monkeypatch, tmp_path):
    here = pools[0].address

    def message(files: Any = ()) -> str:
        with pytest.raises(UserError) as caught, working([here], files=files):
            pass
        return str(caught.value)

    (tmp_path / "seen").write_text("12345")
    with working([here], files=[(str(tmp_path / "seen"), 5), (str(tmp_path), None)]):
        pass
    assert f"{here} does not see {tmp_path}/seen: give a URL" in message([(str(tmp_path / "seen"), 6)])
    assert "does not see nowhere" in message([("nowhere", None)])
    known = handshake.versions()
    monkeypatch.setattr(handshake, "versions", lambda: known | {"polars": "0.1"})
    assert message() == (
        f"hosts: {here} has polars {known['polars']} (here 0.1): install the same as where the job runs. Nothing was written."
    )
    monkeypatch.setenv(handshake.KEY_VARIABLE, "guess")
    assert "has another TASKFUSE_POOL_KEY" in message()
    assert "guess" not in message()
    assert KEY not in message()


def test_strangers_get_no_worker_and_do_not_disturb(pools):
    before = pools[1].log.count("started worker")
    host, port = pools[1].address.split(":")
    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04}\n", b"[" * 9000 + b"\n", b"x" * 100_000):
        with socket.create_connection((host, int(port)), 5) as stranger, suppress(OSError):
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            assert len(stranger.makefile("rb").read()) < 200
    wait_for(lambda: pools[1].log.count("refused") >= 5, "the refusals", 5)
    assert pools[1].log.count("started worker") == before
    with working([pools[1].address]) as one:
        assert one.submit("step", 0, 0).result(30).error.isdecimal()


def test_a_proof_without_the_secret_or_of_another_exchange_gets_no_worker(pools):
    def answer(proof: str) -> dict[str, Any]:
        host, port = pools[0].address.split(":")
        with socket.create_connection((host, int(port)), 5) as stranger:
            nonce = yaml.safe_load(stranger.makefile().readline())["nonce"]
            seen.append(nonce)
            stranger.sendall(b'{"nonce": "a", "proof": "%s", "files": [["nowhere", null]]}\n' % proof.encode())
            return yaml.safe_load(stranger.makefile().readline())

    seen: list[str] = []
    wrong = {"refused": f"has another {handshake.KEY_VARIABLE}"}  # nor a word of which files are there
    assert answer("") == wrong
    right = handshake.proof(KEY.encode(), "job", seen[0], "a")
    assert answer(right) == wrong
    assert len(set(seen)) == 2


@pytest.mark.parametrize("knows", ["another secret", "what the job has sent"])
def test_a_job_unpickles_nothing_of_a_pool_without_the_secret(knows):
    job, pool = socket.socketpair()

    def pretend() -> None:
        with pool, pool.makefile("rw") as lines:
            print(json.dumps({"nonce": "a"}), file=lines, flush=True)
            asked = json.loads(lines.readline())
            guess = handshake.proof(b"guess", "pool", "a", asked["nonce"])
            proof = guess if knows == "another secret" else asked["proof"]
            print(json.dumps({"proof": proof, "versions": {}}), file=lines, flush=True)

    threading.Thread(target=pretend, daemon=True).start()
    with job, pytest.raises(handshake.HandshakeError, match="has another TASKFUSE_POOL_KEY"):
        handshake.greet_pool(job, KEY.encode(), {}, [])


def end_of_pool(*arguments: str, **environment: str) -> str:
    """The line with which a pool does not start."""
    command = [sys.executable, "-m", "pipeline.ingest.runners.pool", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_a_pool_does_not_start_open_to_the_network_or_where_workers_could_do_nothing(tmp_path):
    assert re.match(r"pool: --host=0.0.0.0 without TASKFUSE_POOL_KEY: [^\n]+\n$", end_of_pool("--host=0.0.0.0"))
    for name in ("polars", "apache_beam"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    without = f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"
    assert re.match(r"[^\n]+No module named polars\n$", end_of_pool(PYTHONPATH=without))
    (tmp_path / "polars.py").unlink()
    line = end_of_pool("--beam", PYTHONPATH=without)
    assert line == f"pool: {sys.executable} lacks Beam: No module named apache_beam\n"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"pool: cannot listen on 127.0.0.1:{port}: " in end_of_pool(f"--port={port}")


@pytest.mark.parametrize(
    ("named", "fault"),
    [
        ([], "set hosts=[HOST:50000,…]"),
        (["h1"], "'h1' is not HOST:PORT"),
        (["h1:port"], "'h1:port' is not HOST:PORT"),
        (["h1:70000"], "is not HOST:PORT"),
        (["::1:50000"], "is not HOST:PORT"),
        (["h1:1", "h2:1", "h1:1"], "h1:1 is there twice"),
        (["h1:1", "127.0.0.1:1"], "hosts: h1:1 without TASKFUSE_POOL_KEY: whoever listens there could run code here"),
    ],
)
def test_hosts_that_are_none_are_refused_before_anything_is_read(
    named, fault, small_log, small_content, tmp_path, monkeypatch
):
    monkeypatch.delenv(handshake.KEY_VARIABLE, raising=False)
    assert fault in refused(small_log, tmp_path / "out", small_content(), runner="hosts", hosts=named)


def test_an_address_may_be_ipv6(monkeypatch):
    monkeypatch.setenv(handshake.KEY_VARIABLE, KEY)
    assert [(each.host, each.port) for each in addresses(["[::1]:50000", "h:1"])] == [("::1", 50000), ("h", 1)]
