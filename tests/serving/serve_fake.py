"""A server as a process, of a package whose every batch takes half a second: `python serve_fake.py PACKAGE`."""

import sys
import time
from pathlib import Path
from typing import Any

from fake_package import fake

from jobs.entry import configure_logging, user_errors
from pipeline.serving.http import server
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.packages import Packages


def main() -> None:
    package = fake(1)
    program = package.scorer.program

    def slow(embedding_BE: Any, x_B1: Any) -> Any:
        time.sleep(0.5)
        return program(embedding_BE, x_B1)

    object.__setattr__(package.scorer, "program", slow)
    Packages.load = lambda *_: package  # type: ignore[assignment]
    configure_logging("info")
    with user_errors():
        server.serve(ServeConfig(package=Path(sys.argv[1]), port=0, drain_s=1.0, end_s=10))


main()
