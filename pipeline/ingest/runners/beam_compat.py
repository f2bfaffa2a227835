"""Beam as this release needs it. With its unstable names, and tests/ingest/test_beam_compat.py."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Drops what Beam logs while it is imported: warnings about cloud clients that are not installed.

    It calls logging.warning, which installs a handler of the root logger unless it has one, hence the NullHandler.
    """
    root, handler = logging.getLogger(), logging.NullHandler()

    def is_ours(record: logging.LogRecord) -> bool:
        return "apache_beam" not in record.pathname

    root.addHandler(handler)
    root.addFilter(is_ours)
    try:
        yield
    finally:
        root.removeFilter(is_ours)
        root.removeHandler(handler)


with _quiet_import():
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # not documented
    from apache_beam.runners.runner import create_runner  # documented as internal
    from apache_beam.transforms.window import GlobalWindows
    from apache_beam.utils.windowed_value import WindowedValue

__all__ = ["FnApiRunner", "GlobalWindows", "PipelineOptions", "WindowedValue", "beam", "create_runner", "errors_only"]


@contextmanager
def errors_only() -> Iterator[None]:
    """Beam logs every stage of a pipeline."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
