"""How many CPU cores a process may use."""

import math
import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time, in a period of so many


def available() -> int:
    """Cores that this process may run on, at most its container's CPU limit (cgroup v2): more threads would be throttled."""
    bound = len(os.sched_getaffinity(0))
    try:
        quota_us, period_us = map(int, CPU_MAX.read_text().split())
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return bound
    return max(1, min(bound, math.ceil(quota_us / period_us)))
