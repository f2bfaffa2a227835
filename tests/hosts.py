"""Hosts on one machine: network namespaces behind one switch, each with a name, an address and a hosts file of its own."""

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

PREFIX_LENGTH = 24
# Within `ip netns exec`, whose mounts are its own already: $1 is the host's name, $2 its hosts file, the rest the command.
AS_HOST = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


class Host:
    """A host of `hosts`.

    Attributes:
        name: what `hostname` prints there, and all hosts resolve. address: IPv4, of eth0.
    """

    def __init__(self, namespace: str, name: str, address: str, hosts_file: Path) -> None:
        self.namespace, self.name, self.address, self.hosts_file = namespace, name, address, hosts_file

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` on this host."""
        within = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", AS_HOST, "sh"]
        return [*within, self.name, str(self.hosts_file), *words]

    def start(self, *words: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        """Starts a process here, in a session of its own; `env` is added to the environment, gloo set to eth0."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **(env or {})}
        return subprocess.Popen(self.command(*words), env=environment, start_new_session=True, text=True, **options)

    def kill(self) -> None:
        """Kills every process of this host, as a power cut does; its address stays."""
        for pid in _ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        """Cuts its link, without a signal to anybody."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def reconnect(self) -> None:
        """Restores its link."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def limit(self, rate: str) -> None:
        """Limits what it sends, to e.g. 100mbit: tc's words."""
        _run("ip", "netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev", "eth0", "root",
             "tbf", "rate", rate, "burst", "256kb", "latency", "200ms")  # fmt: skip


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Hosts of these names, 10.77.0.1, .2 and so on; everything that runs there is killed at the end."""
    lab = f"tf{uuid.uuid4().hex[:8]}"
    switch = f"{lab}-switch"
    addresses = [f"10.77.0.{number}" for number in range(1, len(names) + 1)]
    with tempfile.TemporaryDirectory() as folder:
        hosts_file = Path(folder, "hosts")
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(addresses, names, strict=True))]
        hosts_file.write_text("\n".join(lines) + "\n")
        found = [Host(f"{lab}-{n}", n, a, hosts_file) for n, a in zip(names, addresses, strict=True)]
        namespaces = [switch, *(host.namespace for host in found)]
        try:
            for namespace in namespaces:
                _ip("netns", "add", namespace)
                _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", switch, "link", "set", "switch", "up")
            for number, host in enumerate(found):
                _ip(
                    "-n",
                    host.namespace,
                    "link",
                    "add",
                    "eth0",
                    "type",
                    "veth",
                    "peer",
                    f"port{number}",
                    "netns",
                    switch,
                )
                _ip("-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
                _ip("-n", host.namespace, "addr", "add", f"{host.address}/{PREFIX_LENGTH}", "dev", "eth0")
                _ip("-n", host.namespace, "link", "set", "eth0", "up")
            yield found
        finally:
            for host in found:
                with suppress(subprocess.CalledProcessError):
                    host.kill()
            for namespace in namespaces:
                with suppress(subprocess.CalledProcessError):
                    _ip("netns", "delete", namespace)


def require_hosts() -> None:
    """Skips the test where this machine has no network namespaces to give; in CI that is a failure."""
    reason = None
    if os.geteuid() or not shutil.which("ip"):
        reason = "hosts as network namespaces need root and iproute2's ip"
    elif subprocess.run(["unshare", "--net", "--uts", "true"], check=False, capture_output=True).returncode:
        reason = "the kernel refuses network namespaces here"
    if reason and "CI" in os.environ:
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str | Sequence[str]) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout
