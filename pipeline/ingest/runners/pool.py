"""A worker pool: one a host, for jobs with runner=hosts.

A job that connects gets a worker process a connection, which ends with the connection. Whoever has the secret
TASKFUSE_POOL_KEY can run code here; without one a pool listens on this machine alone.

Examples:
  TASKFUSE_POOL_KEY=… python -m pipeline.ingest.runners.pool --host=0.0.0.0 --port=50000
  python -m pipeline.ingest.runners.pool --beam --host=10.0.0.4 --port=50000    # for runner=portable and flink
"""

import argparse
import ctypes
import ipaddress
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

from features.errors import UserError, one_line
from features.printable import printable
from pipeline.ingest.runners import handshake
from pipeline.processes import end_with

logger = logging.getLogger("pipeline.ingest.runners.pool")  # also where this module is __main__

COMMAND = [sys.executable, "-m", "pipeline.ingest.runners.pool"]
CHECK_MS = 200  # whether a worker, or its job, has ended
# A job that ends closes its connections: what a worker is in the middle of is of no use to anyone.
ENDED = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


def main() -> None:
    """Serves until it is ended."""
    arguments = _arguments()
    if arguments.worker_of:
        _be_worker(arguments.worker_of)
    try:
        if arguments.beam:
            serve_beam(arguments.host, arguments.port)
        else:
            serve(arguments.host, arguments.port)
    except UserError as error:
        sys.exit(f"pool: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=" ".join(["python", *COMMAND[1:]]),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=50000, help="0 takes a free one (default: 50000)")
    parser.add_argument("--beam", action="store_true", help="be a pool of Beam's own, which asks nobody who connects")
    parser.add_argument("--worker-of", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def serve(host: str, port: int) -> None:
    """Listens, and gives each connection a worker. Raises UserError where it cannot."""
    key, own = handshake.key_of_environment(), handshake.versions()
    if not key and not is_loopback(host):
        raise UserError(
            f"--host={host} without {handshake.KEY_VARIABLE}: whoever can connect could run code here. Set it to the same "
            "secret here and where the job runs."
        )
    _import_steps()
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {one_line(error)}") from None
    _log()
    logger.info(
        "listening on %s:%d  %s", host, listener.getsockname()[1], "  ".join(f"{n} {v}" for n, v in own.items())
    )
    while True:
        connection, peer = listener.accept()
        threading.Thread(target=_serve_one, args=(connection, str(peer[0]), key), daemon=True).start()


def serve_beam(host: str, port: int) -> None:
    """A pool for runners of Beam's own. Raises UserError where this python lacks Beam, or it cannot listen."""
    _import_steps()
    try:  # before there is a handler for what Beam logs meanwhile
        from pipeline.ingest.runners.beam_compat import serve_beam_pool
    except ImportError as error:
        raise UserError(f"{sys.executable} lacks Beam: {one_line(error)}") from None
    _log()
    serve_beam_pool(host, port)


def _log() -> None:
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pipeline").setLevel(logging.INFO)


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can connect to an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _import_steps() -> None:
    """Raises UserError where a worker could do nothing: better said here than by each of its processes."""
    try:
        import pipeline.ingest.steps  # noqa: F401
    except ImportError as error:
        raise UserError(f"{sys.executable} cannot run workers: {one_line(error)}") from None


def _serve_one(connection: socket.socket, peer: str, key: bytes) -> None:
    """A connection to its end, and its worker's; this thread must outlive the worker, whose parent it is for the system."""
    with connection:
        try:
            handshake.notice_silence(connection)
            # As installed now: the worker imports what an upgrade since has put there.
            handshake.greet_job(connection, key, handshake.versions())
        except (handshake.HandshakeError, UserError, OSError) as error:
            logger.warning("%s: refused: %s", peer, printable(one_line(error)))
            return
        command = [*COMMAND, f"--worker-of={os.getpid()}"]
        try:
            process = subprocess.Popen(command, stdin=connection.fileno(), stdout=connection.fileno())
        except OSError as error:
            logger.warning("%s: no worker could be started: %s", peer, one_line(error))
            return
        logger.info("%s: started worker %d", peer, process.pid)
        poller = select.poll()
        poller.register(connection, ENDED)
        while process.poll() is None:
            if poller.poll(CHECK_MS):
                process.kill()
                process.wait()
                logger.info("%s: worker %d ended with its job", peer, process.pid)
                return
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        if process.returncode:
            logger.warning("%s: worker %d ended with %d", peer, process.pid, process.returncode)


def _be_worker(pool: int) -> None:
    """What a worker process does (see pipeline.ingest.workers); it ends with its pool."""
    from pipeline.ingest import workers

    end_with(pool, ctypes.CDLL(None), signal.SIGKILL)
    try:
        workers.main()
    except OSError:  # the job's host is gone
        os._exit(0)


if __name__ == "__main__":
    main()
