"""Small Beam pipelines on Spark's local mode: what they make is what Beam's own runner makes."""

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from spark_cluster import why_not

from features.errors import UserError
from pipeline.ingest.runners import spark_cluster, spark_tasks
from pipeline.ingest.runners.beam_compat import FnApiRunner, WindowedValue, beam, errors_only
from pipeline.ingest.runners.spark import SparkResult, SparkRunner, run_steps
from pipeline.ingest.runners.spark_tasks import Measured, Step, check_versions
from pipeline.ingest.runners.spark_translation import Collection, transforms_of, translate

needs_java = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
LOCAL = "local[2,3]"  # two cores, three attempts at a task


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    quick = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    with spark_cluster.application(
        LOCAL, {"spark.ui.enabled": "false", "spark.driver.extraJavaOptions": quick, "spark.taskfuse.wait": "100"}
    ) as context:
        yield context


@pytest.fixture(scope="module")
def runner(context) -> SparkRunner:
    """The runner, on one application for all tests."""

    class Shared(SparkRunner):
        def run_pipeline(self, pipeline, options):
            measured = Measured()
            translate(transforms_of(pipeline), partial(run_steps, context, measured))
            return SparkResult(measured)

    return Shared(LOCAL, {})


Build = Callable[[beam.Pipeline], beam.PCollection]


def made_by(runner: beam.runners.PipelineRunner, build: Build) -> list[Any]:
    """The elements of the collection that `build` ends with, in no order."""
    with tempfile.TemporaryDirectory() as folder:

        def save(elements, path=f"{folder}/made"):
            with open(path, "wb") as file:  # noqa: PTH123
                pickle.dump(elements, file)

        with errors_only(), beam.Pipeline(runner) as pipeline:
            combined = build(pipeline) | "all" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
            combined | "save" >> beam.Map(save)
        return sorted(pickle.loads(Path(folder, "made").read_bytes()), key=repr)


def late() -> beam.DoFn:
    """Yields its elements when the bundle ends. Pickled whole: workers have not this file."""

    class Late(beam.DoFn):
        def start_bundle(self):
            self.seen = []

        def process(self, element):
            self.seen.append(element)

        def finish_bundle(self):
            for element in self.seen:
                yield beam.transforms.window.GlobalWindows.windowed_value(element + 100)

    return Late()


def _branches(collection: beam.PCollection, label: str) -> beam.PCollection:
    other = collection | f"{label} other" >> beam.Map(lambda x: -x)
    return (collection, other) | f"{label} both" >> beam.Flatten()


def _groups(collection: beam.PCollection, label: str) -> beam.PCollection:
    keyed = collection | f"{label} keys" >> beam.Map(lambda x: (x % 3, x))
    return keyed | f"{label} grouped" >> beam.GroupByKey() | f"{label} sums" >> beam.MapTuple(lambda k, v: k + sum(v))


OPERATIONS: dict[str, Callable[[beam.PCollection, str], beam.PCollection]] = {
    "reshuffle": lambda c, label: c | label >> beam.Reshuffle(),
    "map": lambda c, label: c | label >> beam.Map(lambda x, add, times: x * times + add, 7, times=3),
    "flat map": lambda c, label: c | label >> beam.FlatMap(lambda x: range(x % 4)),
    "filter": lambda c, label: c | label >> beam.Filter(lambda x: x % 2),
    "late": lambda c, label: c | label >> beam.ParDo(late()),
    "branches": _branches,
    "groups": _groups,
    "largest by key": lambda c, label: (
        c
        | f"{label} keys" >> beam.Map(lambda x: (x % 2, x))
        | label >> beam.CombinePerKey(max)
        | f"{label} values" >> beam.Values()
    ),
    "sum": lambda c, label: c | label >> beam.CombineGlobally(sum),
    "sum of some": lambda c, label: c | label >> beam.CombineGlobally(sum).without_defaults(),
    "count": lambda c, label: c | label >> beam.combiners.Count.Globally(),
}


@needs_java
@pytest.mark.integration
@settings(max_examples=2, deadline=None, database=None, phases=[Phase.generate])
@given(st.lists(st.integers(0, 99), max_size=5), st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=4, max_size=7))
def test_random_pipelines_make_what_beams_own_runner_makes(runner, elements, names):
    def build(pipeline: beam.Pipeline) -> beam.PCollection:
        collection = pipeline | beam.Create(elements)
        for number, name in enumerate(names):
            collection = OPERATIONS[name](collection, f"{number} {name}")
        return collection

    assert made_by(runner, build) == made_by(FnApiRunner(), build)


@needs_java
@pytest.mark.integration
def test_each_operation_makes_what_beams_own_runner_makes(runner):
    def build(pipeline: beam.Pipeline, elements=(3, 1, 4, 1, 5)) -> beam.PCollection:
        start = pipeline | beam.Create(elements)
        made = [
            operate(start, name) | f"{name} named" >> beam.Map(lambda x, name: (name, x), name)
            for name, operate in OPERATIONS.items()
        ]
        made.append(pipeline | beam.Impulse())
        return tuple(made) | beam.Flatten()

    found = made_by(runner, build)
    assert found == made_by(FnApiRunner(), build)
    assert len(found) > 30
    nothing = partial(build, elements=())
    assert made_by(runner, nothing) == made_by(FnApiRunner(), nothing)


@needs_java
@pytest.mark.integration
def test_a_task_is_an_element_and_one_that_fails_is_tried_again_but_counted_once(runner, tmp_path):
    class Fails(beam.DoFn):
        def setup(self):
            self.set_up = True

        def start_bundle(self):
            self.elements = 0

        def process(self, element, folder=str(tmp_path)):
            assert self.set_up
            self.elements += 1
            beam.metrics.Metrics.counter("mine", "seen").inc(element)
            beam.metrics.Metrics.distribution("mine", "sizes").update(element)
            mark = Path(folder, str(element))
            if element == 2 and not mark.exists():
                mark.touch()
                raise OSError("this worker has no luck")
            mark.touch()
            yield self.elements

        def finish_bundle(self):
            beam.metrics.Metrics.counter("mine", "bundles").inc()

    with beam.Pipeline(runner) as pipeline:
        made = pipeline | beam.Create([1, 2, 4]) | beam.Reshuffle() | "count" >> beam.ParDo(Fails())
        made | "read a second time" >> beam.Map(lambda x: x)
        made | beam.combiners.ToList() | beam.Map(lambda found, path=str(tmp_path): Path(path, str(found)).touch())
    counters = {each.key.metric.name: each for each in pipeline.result.metrics().query()["counters"]}
    assert {name: each.result for name, each in counters.items()} == {"seen": 7, "bundles": 3}
    assert counters["seen"].key.step == "count"
    (sizes,) = pipeline.result.metrics().query()["distributions"]
    assert (sizes.key.metric.name, sizes.result.sum, sizes.result.count) == ("sizes", 7, 3)
    assert (sizes.committed.min, sizes.committed.max) == (1, 4)
    assert pipeline.result.wait_until_finish() == pipeline.result.state == "DONE"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "4", "[1, 1, 1]"]
    only = beam.metrics.MetricsFilter().with_name("bundles")
    assert [each.key.metric.name for each in pipeline.result.metrics().query(only)["counters"]] == ["bundles"]


@needs_java
@pytest.mark.integration
def test_a_user_error_on_a_worker_is_one_line_at_once_and_a_defect_its_python_traceback(runner, tmp_path):
    def refuse(element, folder=str(tmp_path)):
        Path(folder, f"{os.getpid()}-{len(os.listdir(folder))}").touch()  # noqa: PTH208
        raise UserError(f"row {element} is bad")

    with pytest.raises(UserError, match=r"^row 7 is bad$"), beam.Pipeline(runner) as pipeline:
        pipeline | beam.Create([7]) | beam.Map(refuse)
    assert len(list(tmp_path.iterdir())) == 1

    def divide(element):
        return 1 / element

    with pytest.raises(RuntimeError) as caught, beam.Pipeline(runner) as pipeline:
        pipeline | beam.Create([0]) | "divide" >> beam.Map(divide)
    assert str(caught.value).startswith("on worker ")
    assert "step divide: Traceback" in str(caught.value)
    assert str(caught.value).endswith("ZeroDivisionError: division by zero")
    assert "\tat " not in str(caught.value)


@needs_java
@pytest.mark.integration
def test_a_process_that_has_an_application_of_its_own_is_one_line(context):
    line = r"^runner=spark: Spark does not start: .*existing SparkContext\(app=[^\n]*$"
    with pytest.raises(UserError, match=line), spark_cluster.application(LOCAL, {}):
        pass
    assert context.parallelize([1, 2]).count() == 2


# Without Spark


class Timed(beam.DoFn):
    def process(self, element, time=beam.DoFn.TimestampParam):
        yield element


REFUSED: dict[str, tuple[Build, str]] = {
    "side inputs": (
        lambda start: start | "mine" >> beam.Map(lambda x, y: x, beam.pvalue.AsList(start)),
        "side inputs",
    ),
    "side inputs of a combiner": (
        lambda start: start | "mine" >> beam.CombineGlobally(lambda x, y: 0, beam.pvalue.AsList(start)),
        "side inputs",
    ),
    "tagged outputs": (lambda start: (start | "mine" >> beam.ParDo(late()).with_outputs("a", main="b"))["a"], "tagged"),
    "times": (lambda start: start | "mine" >> beam.ParDo(Timed()), "parameters of a DoFn"),
    "windows": (lambda start: start | "mine" >> beam.WindowInto(beam.transforms.window.FixedWindows(5)), "WindowInto"),
    "views": (lambda start: start | "mine" >> beam.CombineGlobally(sum).as_singleton_view(), "singleton views"),
    "sources": (lambda start: start.pipeline | "mine" >> beam.io.ReadFromText(__file__), "mine"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_runner_does_not_translate_is_refused_by_name_before_anything_runs(name):
    build, what = REFUSED[name]
    pipeline = beam.Pipeline(SparkRunner("spark://nobody:1", {}))
    build(pipeline | beam.Create([1]))
    with pytest.raises(UserError) as caught:
        pipeline.run()
    assert "mine" in str(caught.value)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_made_of_all_results_of_a_step_is_made_by_the_driver_alone():
    ran: list[tuple[bool, list[str]]] = []

    def run(collection: Collection) -> list[list[Any]]:
        ran.append((collection.on_driver, [step.label for step in collection.steps]))
        return [spark_tasks.run_bundle(collection.steps, bundle).elements for bundle in collection.bundles]

    pipeline = beam.Pipeline(SparkRunner("spark://nobody:1", {}))
    listed = (
        pipeline
        | beam.Create([3, 4])
        | "do" >> beam.Map(lambda x: x + 1)
        | "gather" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
    )
    listed | "plan" >> beam.FlatMap(sorted) | beam.Reshuffle() | "next" >> beam.Map(str)
    translate(transforms_of(pipeline), run)
    assert ran == [(False, ["do", "gather"]), (True, ["gather", "plan"]), (False, ["next"])]
    spark_tasks.unload()


def test_functions_of_a_bundle_that_failed_are_torn_down_and_loaded_anew():
    torn_down = []

    class Fails(beam.DoFn):
        def process(self, element):
            raise ValueError(element)

        def teardown(self):
            torn_down.append(self)

    steps = (Step("fails", b""),)
    spark_tasks.LOADED[steps] = [(Fails(), (), {})]
    with pytest.raises(ValueError, match="7"):
        spark_tasks.run_bundle(steps, [7])
    assert len(torn_down) == 1
    assert not spark_tasks.LOADED


def test_functions_are_set_up_once_a_process_and_torn_down_when_the_next_ones_come():
    calls = []

    class Recorded(beam.DoFn):
        def setup(self):
            calls.append("setup")

        def process(self, element):
            return [element, WindowedValue(element, 0, [])]

        def teardown(self):
            calls.append("teardown")

        def __reduce__(self):
            return "recorded"

    fn = Recorded()
    steps = (Step("a", b""),)
    spark_tasks.LOADED[steps] = [(fn, (), {})]
    assert spark_tasks.run_bundle(steps, [1, 2]).elements == [1, 1, 2, 2]
    assert calls == []
    other = (Step.of("b", late()),)
    assert spark_tasks.run_bundle(other, [1]).elements == [101]
    assert calls == ["teardown"]
    spark_tasks.unload()
    assert not spark_tasks.LOADED


def test_other_versions_of_packages_than_the_drivers_are_named():
    check_versions(tuple(spark_tasks.installed().items()))
    with pytest.raises(UserError, match=r"Spark worker .* has pyarrow .* \(the driver has 1\.0\)"):
        check_versions((("pyarrow", "1.0"),))
    bundle = spark_tasks.run_task((Step("unread", b"no pickle"),), {"pyarrow": "1.0"}, [1])
    assert "pyarrow" in str(bundle.failure)
    assert not bundle.elements
