"""What one Spark task does: a bundle of elements through some ParDos. It runs on the workers, which need no more of Spark."""

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from zipimport import zipimporter

from features.errors import UserError
from pipeline.ingest.runners.beam_compat import WindowedValue, beam
from pipeline.ingest.runners.spark_compat import (
    DistributionData,
    MetricKey,
    MetricsContainer,
    TimestampedValue,
    pickler,
    set_current_tracker,
)

# On whose versions the bytes that a step writes may depend.
PACKAGES = ("apache-beam", "numpy", "polars", "pyarrow")


@dataclass(frozen=True)
class Step:
    """A ParDo.

    Attributes:
        label: of the transform, which counters and Spark's pages are named by.
        pickled: its DoFn, and the further arguments of `process`.
    """

    label: str
    pickled: bytes

    @classmethod
    def of(cls, label: str, fn: beam.DoFn, args: Sequence[Any] = (), named: dict[str, Any] | None = None) -> "Step":
        """Pickles the function as Beam does."""
        return cls(label, pickler.dumps((fn, tuple(args), named or {})))


@dataclass
class Measured:
    """What steps counted and measured, as Beam's metrics."""

    counters: Counter[MetricKey] = field(default_factory=Counter)
    distributions: dict[MetricKey, DistributionData] = field(default_factory=dict)

    def add(self, counters: dict[MetricKey, int], distributions: dict[MetricKey, DistributionData]) -> None:
        """Adds those of one more bundle or step."""
        self.counters.update(counters)
        for key, data in distributions.items():
            known = self.distributions.get(key)
            self.distributions[key] = known.combine(data) if known else data


@dataclass
class Bundle:
    """What a task returns: with its result, so that of two attempts at a task one counts.

    Attributes:
        failure: the line of a UserError, in place of elements: asking again would not change it.
    """

    elements: list[Any] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    failure: str | None = None


class Tracker:
    """Where the metrics of a step go while it runs in this process."""

    def __init__(self, label: str) -> None:
        self.container = MetricsContainer(label)

    def update_metric(self, name: Any, value: Any) -> None:
        """Called by Beam's metrics."""
        self.container.get_metric_cell(name).update(value)


Loaded = list[tuple[beam.DoFn, tuple[Any, ...], dict[str, Any]]]
LOADED: dict[tuple[Step, ...], Loaded] = {}  # of the last task in this process; the next one has mostly the same steps


def run_task(steps: tuple[Step, ...], versions: dict[str, str], elements: Iterable[Any]) -> Bundle:
    """Puts a bundle of elements through some ParDos, after a look at this worker's packages."""
    try:
        check_versions(tuple(versions.items()))
        if steps not in LOADED:
            _load(steps)
            gc.freeze()  # Spark collects garbage after each task: that would be going over all of Beam, .2 s
        return run_bundle(steps, elements)
    except UserError as error:
        return Bundle(failure=str(error))
    finally:
        _forget_archives()


def _forget_archives() -> None:
    """Before each task Spark drops Python's caches of imports, for which an archive's directory is read again, .1 s in all."""
    for path, finder in [*sys.path_importer_cache.items()]:
        if isinstance(finder, zipimporter):
            del sys.path_importer_cache[path]


def run_bundle(steps: tuple[Step, ...], elements: Iterable[Any]) -> Bundle:
    """Puts a bundle of elements through some ParDos. Functions are set up once a process, as in Beam."""
    bundle = Bundle(list(elements))
    try:
        for step, (fn, args, named) in zip(steps, _load(steps), strict=True):
            tracker = Tracker(step.label)
            set_current_tracker(tracker)
            bundle.elements = list(_through(fn, args, named, bundle.elements))
            found = tracker.container.get_cumulative()
            bundle.measured.add(found.counters, found.distributions)
    except BaseException:
        unload()  # whose state is not known any more
        raise
    finally:
        set_current_tracker(None)
    return bundle


def _load(steps: tuple[Step, ...]) -> Loaded:
    if steps not in LOADED:
        unload()
        loaded = LOADED[steps] = []
        for step in steps:
            fn, args, named = pickler.loads(step.pickled)
            loaded.append((fn, args, named))
            fn.setup()
    return LOADED[steps]


def unload() -> None:
    """Tears down the functions of this process."""
    while LOADED:
        for fn, _, _ in LOADED.popitem()[1]:
            fn.teardown()


def _through(fn: beam.DoFn, args: tuple[Any, ...], named: dict[str, Any], elements: list[Any]) -> Iterator[Any]:
    fn.start_bundle()
    for element in elements:
        yield from map(_value, fn.process(element, *args, **named) or ())
    yield from map(_value, fn.finish_bundle() or ())


def _value(output: Any) -> Any:
    """An element: all are in the global window, and nothing here asks for their times."""
    if isinstance(output, beam.pvalue.TaggedOutput):
        raise UserError(f"runner=spark: it has no tagged outputs, such as {output.tag}")
    return output.value if isinstance(output, WindowedValue | TimestampedValue) else output


def installed() -> dict[str, str]:
    """The versions of PACKAGES in this Python."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


@lru_cache
def check_versions(wanted: tuple[tuple[str, str], ...]) -> None:
    """Raises UserError where this worker has other packages than the driver, whose versions are `wanted`."""
    here = installed()
    if other := [f"{name} {here[name]} (the driver has {wanted})" for name, wanted in wanted if here[name] != wanted]:
        import socket

        raise UserError(
            f"Spark worker {socket.gethostname()}: {sys.executable} has {', '.join(other)}. Install the driver's versions "
            "there: other ones may write other bytes."
        )
