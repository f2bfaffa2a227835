"""Settings of jobs.serve."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.storage.store_path import Place

Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


class ServeConfig(BaseModel):
    """What serves, where it listens, and its limits.

    Attributes:
        package: the folder of a package, or a link to it; one of another content in its place is loaded and takes over.
        packages, serving: instead of it, a folder of packages, and the OUT of nightly whose serving.json names the checkpoint.
        host, port: where it listens; port 0: a free one, which it prints. reuse_port: share the port with other servers.
        compiled: run the package's compiled program. check: compare the checksum of every file while loading.
        warm_up: rows of the first answer, before a package serves.
        threads: that score. max_batch_rows: of requests that are scored at once; a larger request is scored alone.
        batch_wait_ms: how long a request waits for others to be scored with it; while a thread scores they wait in any case.
        max_waiting: requests that wait; further ones are refused with 503.
        max_connections: beyond which scores are refused likewise.
        timeout_s: of a request, from its head to its answer: 504, or 408 while its body is missing. A connection without the
            head of a request is closed after as long.
        max_rows: of a request. max_body_bytes: of its body.
        max_buffered_bytes: of memory for the bodies of all requests and, at most, what they are parsed to: 503, 413 for one.
        poll_s: how often it looks for another package.
        drain_s: after SIGTERM, how long it still accepts requests while /healthz answers 503. end_s: then for those in flight.
    """

    model_config = ConfigDict(extra="forbid")

    package: Place | None = None
    packages: Place | None = None
    serving: Place | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    reuse_port: bool = False
    compiled: bool = False
    check: bool = True
    warm_up: Annotated[int, Field(ge=0, le=100_000)] = 512
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    max_batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 2048
    batch_wait_ms: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0
    max_waiting: Annotated[int, Field(ge=1, le=100_000)] = 256
    max_connections: Annotated[int, Field(ge=1, le=100_000)] = 1024
    timeout_s: Annotated[Seconds, Field(gt=0)] = 5.0
    max_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    max_body_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 4 << 20
    max_buffered_bytes: Annotated[int, Field(ge=1, le=1 << 40)] = 256 << 20
    poll_s: Annotated[Seconds, Field(gt=0)] = 1.0
    drain_s: Seconds = 2.0
    end_s: Seconds = 30.0

    @model_validator(mode="after")
    def _one_source(self) -> "ServeConfig":
        pointed = self.packages is not None and self.serving is not None
        if (self.package is not None) == pointed or (self.packages is None) != (self.serving is None):
            raise ValueError("set package=FOLDER, or packages=FOLDER and serving=OUT of nightly")
        return self
