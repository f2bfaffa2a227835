"""What /metrics shows. Names follow https://prometheus.io/docs/practices/naming."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Held:
    """Bytes that a request holds, of those that `metrics.held` counts."""

    def __init__(self, metrics: "Metrics") -> None:
        self.metrics, self.bytes = metrics, 0

    def add(self, number: int) -> None:
        """Holds more."""
        self.bytes += number
        self.metrics.hold(number)

    def release(self) -> None:
        """Holds nothing any more."""
        self.add(-self.bytes)


class Metrics:
    """Counters, gauges and histograms of a server, with those of its process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("taskfuse_serve_requests", "Answers.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "taskfuse_serve_request_seconds", "Time of a request for scores.", registry=registry, buckets=SECONDS
        )  # fmt: skip
        self.rows = Counter("taskfuse_serve_rows", "Rows scored.", registry=registry)
        self.batch_rows = Histogram(
            "taskfuse_serve_batch_rows", "Rows scored at once.", registry=registry, buckets=SIZES
        )
        self.batch_requests = Histogram(
            "taskfuse_serve_batch_requests", "Requests scored at once.", registry=registry, buckets=SIZES
        )
        self.waiting = Gauge("taskfuse_serve_waiting_requests", "Requests that wait to be scored.", registry=registry)
        self.buffered = Gauge("taskfuse_serve_buffered_bytes", "Bytes of requests that are held.", registry=registry)
        self.step = Gauge("taskfuse_serve_model_step", "Step of the checkpoint that serves.", registry=registry)
        self.loaded = Gauge(
            "taskfuse_serve_package_loaded_timestamp_seconds", "When the package was loaded, since 1970.", registry=registry
        )  # fmt: skip
        self.model = Info("taskfuse_serve_model", "The checkpoint and the package that serve.", registry=registry)
        self.swaps = Counter("taskfuse_serve_swaps", "Packages that took over from another one.", registry=registry)
        self.failures = Counter("taskfuse_serve_load_failures", "Packages that could not be loaded.", registry=registry)
        self.stale = Gauge(
            "taskfuse_serve_stale", "1 where another package should serve and cannot; the log says why.", registry=registry
        )  # fmt: skip

        self.held = 0

    def hold(self, number: int) -> None:
        """Counts bytes of requests that are held from now on, fewer for a negative number."""
        self.held += number
        self.buffered.set(self.held)

    def watch(self, waiting: Callable[[], int]) -> None:
        """Reads the length of the queue whenever the figures are read."""
        self.waiting.set_function(waiting)
