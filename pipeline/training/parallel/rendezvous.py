"""Where torchrun's agents meet: on 127.0.0.1 where one node trains, on one interface of node 0 where several do.

A TCPStore of torch listens on all interfaces and does not authenticate clients. Agents that meet by c10d unpickle what is in
it, so anyone who can connect can execute code on their machines; the static rendezvous reads JSON. It shares the server that
its process has at its port already, hence the store that `choose` makes beforehand, on a socket bound to one address.
"""

import errno
import os
import socket
import sys
from argparse import Namespace

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_min_max_nnodes

from features.errors import UserError

LOOPBACK = "127.0.0.1"
PORT = 29500  # torchrun's, of a static rendezvous of several nodes
# torchrun's --rdzv-conf of a number of nodes that changes.
MEETING = {
    "last_call_timeout": 15,  # enough nodes are there: survivors of a failure detect it within seconds of each other
    "join_timeout": 7200,  # a new node waits for the next checkpoint, which may take long
    "keep_alive_interval": 3,  # five misses and a node is gone; the others wait as long after it is lost
    "keep_alive_max_attempt": 5,
}


def choose(options: Namespace) -> dist.TCPStore | None:
    """Sets torchrun's options of the rendezvous: one node meets at a port of 127.0.0.1, whatever they say of it.

    Args:
        options: as torchrun parses them; changed in place. Of one node master_port is kept, and is a free port by default.
    Returns: what the static rendezvous shares as long as it lives; None on nodes that do not listen, or on all interfaces.
    Raises:
        UserError: the port is taken, or options contradict each other.
    """
    fewest, nodes = parse_min_max_nnodes(options.nnodes)
    if options.standalone and nodes > 1:
        raise UserError(f"--standalone is one node and --nnodes={options.nnodes} is more: remove one of the two")
    if options.standalone or (nodes == 1 and options.rdzv_backend in ("static", "c10d")):
        return _on_loopback(options)
    if fewest < nodes:
        _may_change(options)
    options.master_port = options.master_port or PORT
    if options.rdzv_backend == "static":
        return _on_one_interface(options) if options.node_rank == 0 else None
    if options.rdzv_backend == "c10d":
        _choose_host_where_names_are_unknown(options)
    _say(
        f"warning: --rdzv-backend={options.rdzv_backend} runs code from whoever reaches {options.rdzv_endpoint}: let "
        "only this job's nodes reach it, or use --node-rank, --master-addr and --master-port instead"
    )
    return None


def _choose_host_where_names_are_unknown(options: Namespace) -> None:
    """Says whether this machine holds the store, where torch would look up a name that DNS does not know, or not yet.

    Raises:
        UserError: this machine's own name is unknown, and with it the address that other nodes would reach its ranks at.
    """
    if "is_host" in options.rdzv_conf:
        return
    host, _ = parse_rendezvous_endpoint(options.rdzv_endpoint, default_port=PORT)
    name = socket.gethostname()
    if host.partition(".")[0] == name:  # that of a pod may not resolve yet
        here = True
        if _resolves(host):
            return
    elif host == "localhost" or _resolves(name):
        return
    elif not options.local_addr:
        raise UserError(
            f"{name}, the name of this machine, is in neither DNS nor /etc/hosts: other nodes would not reach it. Add it "
            "there, or give --local-addr=ADDRESS."
        )
    else:
        here = _address_here(host) is not None
    options.rdzv_conf = ",".join(filter(None, [options.rdzv_conf, f"is_host={int(here)}"]))


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 0)
    except OSError:
        return False
    return True


def _may_change(options: Namespace) -> None:
    """Options of a number of nodes that changes, where they are not given."""
    if options.rdzv_backend == "static":
        options.rdzv_backend = "c10d"
    if not options.rdzv_endpoint:
        raise UserError(
            f"--nnodes={options.nnodes} needs --rdzv-endpoint=HOST:PORT: where nodes meet, a host that stays to the end"
        )
    given = {part.split("=")[0].strip() for part in options.rdzv_conf.split(",")}
    chosen = [f"{name}={seconds}" for name, seconds in MEETING.items() if name not in given]
    options.rdzv_conf = ",".join([options.rdzv_conf, *chosen] if options.rdzv_conf else chosen)


def open_store(host: str) -> dist.TCPStore:
    """A store of this machine at a free port of the address that other nodes know as `host`; at all where that is unclear."""
    if address := _address_here(host):
        return _store(address, 0)
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _on_loopback(options: Namespace) -> dist.TCPStore:
    if options.node_rank:
        raise UserError(f"--node-rank={options.node_rank} of one node: set --nnodes to how many there are")
    store = _store(LOOPBACK, options.master_port or 0)
    options.standalone, options.rdzv_backend, options.rdzv_endpoint = False, "static", ""
    options.master_addr, options.master_port = LOOPBACK, store.port
    return store


def _on_one_interface(options: Namespace) -> dist.TCPStore | None:
    endpoint = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port or PORT}"
    host, port = parse_rendezvous_endpoint(endpoint, default_port=PORT)
    if address := _address_here(host):
        return _store(address, port)
    # As torch would by itself. The name may be one of a router or proxy in front, or of a pod that DNS does not know yet.
    _say(
        f"note: port {port} is open on all interfaces, since {host} is not one address of this machine: let only "
        "this job's nodes reach it"
    )
    return None


def _address_here(host: str) -> str | None:
    """The address that other nodes reach this machine at, if it is clear which; Debian's hosts file names it 127.0.1.1."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
        [address] = found
        if address.startswith("127.") and host not in (address, "localhost"):
            return None
        _listen(address, 0).close()
    except (OSError, ValueError):  # unknown here, or of another machine; several of them
        return None
    return address


def _store(address: str, port: int) -> dist.TCPStore:
    try:
        listener = _listen(address, port)
    except OverflowError:
        raise UserError(f"port {port} of the rendezvous: ports are 1 to 65535") from None
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(
            f"port {port} of {address}: {os.strerror(error.errno)}. Choose another with --master-port."
        ) from None
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
