"""Kinds of ranks and links between nodes that step times are answered for: public figures, and what is guessed of them."""

import re
from dataclasses import dataclass

from features.errors import UserError

G, T = 10**9, 10**12


@dataclass(frozen=True)
class Kind:
    """A GPU, or a core of a CPU, that is one rank.

    Attributes:
        name: as it is printed.
        flops: peak FLOP/s of dense matrix products by train.precision, without sparsity.
        memory: bytes; 0 for a CPU. memory_bandwidth: bytes/s of HBM, or of a core's share of main memory.
        link: bytes/s to other ranks of the node, in each direction. host_link: the same to main memory.
        flops_share, bandwidth_share, link_share: what of these figures a step sustains; guesses.
        host: seconds that Python and the launches of kernels need for a step, below which none gets; a guess.
    """

    name: str
    flops: dict[str, float]
    memory: int
    memory_bandwidth: float
    link: float
    flops_share: float = 0.4
    bandwidth_share: float = 0.5
    link_share: float = 0.8
    host_link: float = 32 * G
    host: float = 5e-3

    @property
    def device(self) -> str:
        """Where its tables are trained."""
        return "cuda" if self.memory else "cpu"


def _flops(fp32: float, tf32: float, bf16: float) -> dict[str, float]:
    return {"fp32": fp32 * T, "tf32": tf32 * T, "bf16": bf16 * T}


# NVIDIA's data sheets of B200 SXM as in DGX B200, H100 SXM5, H200 SXM, A100 SXM4 (NVLink's total is of both directions, so half
# of it is taken), L4 and T4 (PCIe gen 4 and gen 3, x16; gen 5 has 64 GB/s); figures with sparsity are halved. T4 has no bf16:
# autocast to it is taken to run at the fp32 rate. T4 and CPUs have no TF32. The core has two FMA units of AVX-512 at 2.5 GHz,
# and AMX for bf16; its figures are orders of magnitude.
KINDS = {
    "h100": Kind("H100 SXM 80 GB", _flops(67, 494.5, 989), 80 * G, 3350 * G, 450 * G, host_link=64 * G),
    "h200": Kind("H200 SXM 141 GB", _flops(67, 494.5, 989), 141 * G, 4800 * G, 450 * G, host_link=64 * G),
    "b200": Kind("B200 SXM 180 GB", _flops(75, 1125, 2250), 180 * G, 8000 * G, 900 * G, host_link=64 * G),
    "a100-80gb": Kind("A100 SXM 80 GB", _flops(19.5, 156, 312), 80 * G, 2039 * G, 300 * G),
    "a100-40gb": Kind("A100 SXM 40 GB", _flops(19.5, 156, 312), 40 * G, 1555 * G, 300 * G),
    "l4": Kind("L4 24 GB", _flops(30.3, 60, 121), 24 * G, 300 * G, 32 * G),
    "t4": Kind("T4 16 GB", _flops(8.1, 8.1, 8.1), 16 * G, 320 * G, 16 * G, host_link=16 * G),
    "cpu-core": Kind("CPU core", _flops(0.16, 0.16, 1.0), 0, 10 * G, 5 * G),
}


# What is planned with where nothing else is known of a rank.
DEFAULTS = {"cuda": KINDS["h100"], "cpu": KINDS["cpu-core"]}


def recognised(device: str, memory: int) -> Kind | None:
    """The kind of a GPU with figures, from torch.cuda.get_device_name, such as "NVIDIA A100-SXM4-80GB"; None: no figures of it.

    Args:
        memory: bytes, which kinds of one name differ in.
    """
    words = re.split(r"\W+", device.lower())
    found = [kind for name, kind in KINDS.items() if kind.memory and name.split("-")[0] in words]
    return min(found, key=lambda kind: abs(kind.memory - memory), default=None)


@dataclass(frozen=True)
class Link:
    """The network between nodes.

    Attributes:
        rate: bytes/s of a node, in each direction. share: what of it is sustained. latency, node_latency: seconds of a message
            between nodes and within one. share and latencies are guesses.
    """

    name: str
    rate: float
    share: float = 0.8
    latency: float = 50e-6
    node_latency: float = 10e-6

    @classmethod
    def named(cls, name: str) -> "Link":
        """From a rate as 400gbit or 100mbit.

        Raises:
            UserError: another form.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(mbit|gbit)", name)
        if not match or not float(match[1]):
            raise UserError(f"link={name}: expected the rate of a node's network, such as 100mbit, 10gbit, 400gbit")
        return cls(name, float(match[1]) * (10**9 if match[2] == "gbit" else 10**6) / 8)


DEFAULT_LINK = Link.named("100gbit")
