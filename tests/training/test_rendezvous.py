"""Where torchrun's agents meet: which options become which rendezvous, and at which address its store listens."""

import socket
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.run import get_args_parser, get_rdzv_endpoint

from features.errors import UserError
from pipeline.training.parallel import rendezvous
from pipeline.training.parallel.process_group import listen_on_loopback


def options(*words: str) -> Namespace:
    return get_args_parser().parse_args([*words, "script.py"])


def listening() -> list[tuple[str, int]]:
    """Addresses and ports of this process."""
    used = psutil.Process().net_connections("tcp")
    return [tuple(one.laddr) for one in used if one.status == psutil.CONN_LISTEN]


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "words",
    [
        (), ("--nnodes=1",), ("--standalone",), ("--standalone", "--nnodes=1:1"), ("--rdzv-backend=c10d",),
        ("--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=0.0.0.0:0"), ("--rdzv-endpoint=0.0.0.0:29400",),
        ("--nnodes=1", "--node-rank=0", "--master-addr=pod-0.train"),
    ],
)  # fmt: skip
def test_one_node_meets_at_a_free_port_of_loopback_whatever_its_options_say(words: tuple[str, ...]) -> None:
    given, before = options(*words), listening()
    store = rendezvous.choose(given)
    assert store is not None
    assert [port for port in listening() if port not in before] == [("127.0.0.1", store.port)]
    assert (given.standalone, given.rdzv_backend, get_rdzv_endpoint(given)) == (
        False, "static", f"127.0.0.1:{store.port}",
    )  # fmt: skip


def test_torchruns_static_rendezvous_shares_the_server_and_listens_nowhere_else(free: int) -> None:
    store = rendezvous.choose(options(f"--master-port={free}"))
    assert store is not None
    before = listening()
    # As torch.distributed.elastic.rendezvous.static_tcp_rendezvous does.
    shared = dist.TCPStore("127.0.0.1", free, 1, True, timedelta(seconds=5), multi_tenant=True)
    assert set(listening()) <= set(before), "stores of earlier tests may end meanwhile"
    shared.set("key", "value")
    assert store.get("key") == b"value"


def test_a_port_that_is_taken_is_one_line(taken: int) -> None:
    with pytest.raises(UserError, match=rf"port {taken} of 127\.0\.0\.1: Address already in use\. Choose another"):
        rendezvous.choose(options(f"--master-port={taken}"))
    several = ("--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={taken}")
    with pytest.raises(UserError, match=r"Address already in use"):
        rendezvous.choose(options(*several))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--standalone", "--nnodes=2"), r"--standalone is one node and --nnodes=2 is more"),
        (("--standalone", "--nnodes=1:4"), r"--standalone is one node and --nnodes=1:4 is more"),
        (("--nnodes=1", "--node-rank=1"), r"--node-rank=1 of one node: set --nnodes"),
        (("--master-port=65536",), r"port 65536 of the rendezvous: ports are 1 to 65535"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        rendezvous.choose(options(*words))


def test_node_0_of_several_listens_at_the_address_it_is_given_and_the_others_nowhere(
    free: int, capfd: pytest.CaptureFixture
) -> None:
    words, before = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free}"), listening()
    assert rendezvous.choose(options(*words, "--node-rank=1")) is None
    assert set(listening()) <= set(before), "stores of earlier tests may end meanwhile"
    store = rendezvous.choose(options(*words, "--node-rank=0"))
    assert [port for port in listening() if port not in before] == [("127.0.0.1", free)]
    assert capfd.readouterr().err == ""
    del store
    endpoint = ("--nnodes=2", "--node-rank=0", f"--rdzv-endpoint=127.0.0.1:{free}")
    assert rendezvous.choose(options(*endpoint)) is not None


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("node-0", ["127.0.1.1"]),  # Debian's hosts file on node-0
        ("node-0", ["192.0.2.77"]),  # of a router in front
        ("node-0", ["127.0.0.1", "127.0.0.2"]),
        ("node-0", []),
    ],
)
def test_a_name_that_is_not_one_address_of_this_machine_is_not_bound_to(
    host: str, addresses: list[str], free: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def resolve(*_: object, **__: object) -> list[tuple]:
        if not addresses:
            raise socket.gaierror("unknown")
        return [(None, None, None, "", (address, 0)) for address in addresses]

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        words = ("--nnodes=2", "--node-rank=0", f"--master-addr={host}", f"--master-port={free}")
        assert rendezvous.choose(options(*words)) is None
    said = capfd.readouterr().err
    assert said.startswith(f"note: port {free} is open on all interfaces, since {host} is not one address of this")
    assert said.count("\n") == 1


def test_all_nodes_meet_at_torchruns_port_where_none_is_given() -> None:
    given = options("--nnodes=2", "--node-rank=1", "--master-addr=node-0")
    assert rendezvous.choose(given) is None
    assert get_rdzv_endpoint(given) == "node-0:29500"


def test_a_number_of_nodes_that_changes_meets_by_c10d_and_keeps_what_is_given_of_its_waits() -> None:
    given = options("--nnodes=2:8", "--rdzv-endpoint=node-0:29400", "--rdzv-conf=last_call_timeout=3")
    assert rendezvous.choose(given) is None
    conf = dict(part.split("=") for part in given.rdzv_conf.split(","))
    assert (given.rdzv_backend, conf.pop("last_call_timeout")) == ("c10d", "3")
    assert {"join_timeout", "keep_alive_interval", "keep_alive_max_attempt"} == set(conf)
    with pytest.raises(UserError, match=r"--nnodes=2:8 needs --rdzv-endpoint=HOST:PORT"):
        rendezvous.choose(options("--nnodes=2:8"))


def test_several_nodes_that_meet_by_c10d_are_warned_in_one_line(capfd: pytest.CaptureFixture) -> None:
    given = options("--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=node-0:29400")
    assert rendezvous.choose(given) is None
    assert (given.rdzv_backend, given.rdzv_endpoint) == ("c10d", "node-0:29400")
    said = capfd.readouterr().err
    assert said.startswith("warning: --rdzv-backend=c10d runs code from whoever reaches node-0:29400: let only this ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "interface"),
    [
        ({}, "lo"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "lo"),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, "eth1"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, None),
        ({"WORLD_SIZE": "8"}, None),
    ],
)
def test_ranks_of_one_machine_talk_over_loopback_unless_told_otherwise(
    environment: dict[str, str], interface: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {name: environment.get(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
    with monkeypatch.context() as patch:
        fake: dict[str, str] = {name: value for name, value in changed.items() if value is not None}
        patch.setattr("os.environ", fake)
        listen_on_loopback()
    assert fake.get("GLOO_SOCKET_IFNAME") == interface
    assert fake.get("NCCL_SOCKET_IFNAME") == ("=lo" if interface else None)


@pytest.mark.parametrize(
    ("endpoint", "name", "conf", "said"),
    [
        ("run-7-0.run-7:29500", "run-7-0", "", ["is_host=1"]),
        ("run-7-0.run-7:29500", "run-7-0", "read_timeout=300", ["is_host=1"]),
        ("run-7-0.run-7:29500", "run-7-1", "", []),
        ("run-7-0.run-7:29500", "run-7-0", "is_host=0", ["is_host=0"]),
        ("localhost:29500", "localhost", "", []),  # which resolves: torchrun finds out by itself
    ],
)
def test_the_pod_that_elastic_nodes_meet_at_holds_the_store_before_its_name_resolves(
    endpoint: str, name: str, conf: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, *_: object, **__: object) -> list[object]:
        if host not in ("localhost", "run-7-1"):
            raise socket.gaierror
        return []

    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: name)
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", resolve)
    given = options(
        "--nnodes=2:8", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", *([f"--rdzv-conf={conf}"] if conf else [])
    )
    assert rendezvous.choose(given) is None
    words = given.rdzv_conf.split(",")
    assert [word for word in words if word.startswith("is_host")] == said
    assert not conf or conf in words


def test_a_machine_whose_own_name_is_unknown_is_told_so_or_goes_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = socket.getaddrinfo

    def resolve(host: str, *words: Any, **more: Any) -> Any:
        if host == "nameless":
            raise socket.gaierror
        return lookup(host, *words, **more)

    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "nameless")
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", resolve)
    words = ("--nnodes=2:8", "--rdzv-endpoint=192.0.2.1:29400")
    with pytest.raises(UserError, match=r"nameless, the name of this machine, is in neither DNS nor /etc/hosts"):
        rendezvous.choose(options(*words))
    for endpoint, is_host in (("192.0.2.1:29400", 0), ("127.0.0.1:29400", 1)):
        given = options(words[0], f"--rdzv-endpoint={endpoint}", "--local-addr=127.0.0.1")
        assert rendezvous.choose(given) is None
        assert f"is_host={is_host}" in given.rdzv_conf.split(",")
