"""A Beam pipeline as jobs of Spark.

The primitives are Impulse, Create, ParDo, Reshuffle, GroupByKey, CombineGlobally and Flatten; ParDos in a row are one job. Each
job's results come back to the driver, which spreads them again, an element a task: they name files, they are no rows. So a lost
executor repeats the tasks that it had, never those of an earlier job, whose files may be gone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from features.errors import UserError
from pipeline.ingest.runners.beam_compat import beam
from pipeline.ingest.runners.spark_compat import AppliedPTransform, PipelineVisitor, takes_parameters
from pipeline.ingest.runners.spark_tasks import Step


@dataclass(frozen=True)
class Collection:
    """A PCollection.

    Attributes:
        bundles: elements, those of each task.
        steps: ParDos that they are still to be put through.
        on_driver: where the driver does that: it plans the next step from all results of one. A worker that hangs, is given up
            and goes on would plan it a second time.
    """

    bundles: list[list[Any]]
    steps: tuple[Step, ...] = ()
    on_driver: bool = False

    @property
    def elements(self) -> Iterator[Any]:
        """Those of all bundles."""
        return chain.from_iterable(self.bundles)


Node = Any  # an AppliedPTransform, whose transform is of the type that its rule is for
Run = Callable[[Collection], list[list[Any]]]  # puts bundles through the steps


class Translation:
    """The PCollections of a pipeline so far."""

    def __init__(self, run: Run, uses: Counter[beam.pvalue.PValue]) -> None:
        self.run, self.uses = run, uses
        self.found: dict[beam.pvalue.PValue, Collection] = {}

    def given(self, pcollection: beam.pvalue.PValue) -> Collection:
        """The input of a transform. What several read is made once."""
        found = self.found[pcollection]
        if found.steps and self.uses[pcollection] > 1:
            found = self.found[pcollection] = self.made(found)
        return found

    def made(self, collection: Collection) -> Collection:
        """A collection, no steps left."""
        return replace(collection, bundles=self.run(collection), steps=()) if collection.steps else collection


def transforms_of(pipeline: beam.Pipeline) -> list[Node]:
    """The transforms of a pipeline, in order. Raises UserError for one that there is no rule for."""
    visitor = Transforms()
    pipeline.visit(visitor)
    for node in visitor.found:
        _check(node)
    return visitor.found


def translate(transforms: list[Node], run: Run) -> None:
    """Runs them all."""
    uses = Counter(pcollection for node in transforms for pcollection in node.inputs)
    translation = Translation(run, uses)
    for node in transforms:
        (output,) = node.outputs.values()
        made = RULES[type(node.transform)](translation, node)
        translation.found[output] = made if uses[output] else translation.made(made)


class Transforms(PipelineVisitor):
    """Collects the transforms of a pipeline; composites only where there is a rule for them as a whole."""

    def __init__(self) -> None:
        self.found: list[Node] = []
        self.inside: Node = None

    def enter_composite_transform(self, transform_node: AppliedPTransform) -> None:
        """A composite, before its parts."""
        if self.inside is None and type(transform_node.transform) in RULES:
            self.found.append(transform_node)
            self.inside = transform_node

    def leave_composite_transform(self, transform_node: AppliedPTransform) -> None:
        """A composite, after its parts."""
        if self.inside is transform_node:
            self.inside = None

    def visit_transform(self, transform_node: AppliedPTransform) -> None:
        """A primitive."""
        if self.inside is None:
            self.found.append(transform_node)


def _check(node: Node) -> None:
    transform = node.transform
    if type(transform) not in RULES:
        what = type(transform).__name__
    elif node.side_inputs or any(isinstance(each, beam.pvalue.AsSideInput) for each in _arguments(transform)):
        what = "side inputs"
    elif isinstance(transform, beam.CombineGlobally) and transform.as_view:
        what = "singleton views"
    elif len(node.outputs) != 1 or next(iter(node.outputs)) is not None:
        what = "tagged outputs"
    elif isinstance(transform, beam.ParDo) and takes_parameters(transform.fn):
        what = "parameters of a DoFn, such as its element's time or window"
    else:
        return
    raise UserError(
        f"runner=spark: {node.full_label}: it does not run {what}, only {', '.join(sorted(kind.__name__ for kind in RULES))}, "
        "and what is made of these. Use another runner."
    )


def _arguments(transform: Any) -> Iterable[Any]:
    return [*getattr(transform, "args", ()), *getattr(transform, "kwargs", {}).values()]


def _impulse(_: Translation, __: Node) -> Collection:
    return Collection([[b""]])


def _create(_: Translation, node: Node) -> Collection:
    return _spread(node.transform.values)


def _spread(elements: Iterable[Any]) -> Collection:
    """An element a task."""
    return Collection([[element] for element in elements])


def _reshuffle(translation: Translation, node: Node) -> Collection:
    return _spread(translation.made(translation.given(node.inputs[0])).elements)


def _par_do(translation: Translation, node: Node) -> Collection:
    given, transform = translation.given(node.inputs[0]), node.transform
    step = Step.of(node.full_label, transform.fn, transform.args, transform.kwargs)
    return replace(given, steps=(*given.steps, step))


def _flatten(translation: Translation, node: Node) -> Collection:
    given = [translation.made(translation.given(each)) for each in node.inputs]
    return Collection([bundle for each in given for bundle in each.bundles])


def _group_by_key(translation: Translation, node: Node) -> Collection:
    coder = beam.coders.FastPrimitivesCoder()  # keys are equal, for Beam, where their bytes are
    groups: dict[bytes, tuple[Any, list[Any]]] = {}
    for key, value in translation.made(translation.given(node.inputs[0])).elements:
        groups.setdefault(coder.encode(key), (key, []))[1].append(value)
    return _spread(groups.values())


class Accumulate(beam.DoFn):
    """A bundle's elements to their accumulator, if there are any."""

    def __init__(self, fn: beam.CombineFn) -> None:
        self.fn = fn

    def setup(self) -> None:
        """Once a worker."""
        self.fn.setup()

    def start_bundle(self) -> None:
        """Nothing is added yet."""
        self.accumulators: list[Any] = []

    def process(self, element: Any, *args: Any, **named: Any) -> Iterator[Any] | None:
        """Adds an element."""
        before = self.accumulators or [self.fn.create_accumulator(*args, **named)]
        self.accumulators = [self.fn.add_input(before[0], element, *args, **named)]
        return None

    def finish_bundle(self) -> Iterator[Any]:
        """Yields what it made."""
        yield from self.accumulators

    def teardown(self) -> None:
        """Once a worker."""
        self.fn.teardown()


class Merge(Accumulate):
    """The accumulators of all bundles to the result."""

    def process(self, element: list[Any], *args: Any, **named: Any) -> Iterator[Any]:
        """Yields the result, of one element with all of them."""
        fn = self.fn
        merged = fn.merge_accumulators(element, *args, **named) if element else fn.create_accumulator(*args, **named)
        yield fn.extract_output(merged, *args, **named)


def _combine_globally(translation: Translation, node: Node) -> Collection:
    given, transform = translation.given(node.inputs[0]), node.transform
    args, named = transform.args, transform.kwargs
    fn = beam.CombineFn.maybe_from_callable(transform.fn, has_side_inputs=bool(args or named))
    accumulate = Step.of(node.full_label, Accumulate(fn), args, named)
    found = list(translation.made(replace(given, steps=(*given.steps, accumulate))).elements)
    if not found and not transform.has_defaults:
        return Collection([])
    return Collection([[found]], (Step.of(node.full_label, Merge(fn), args, named),), on_driver=True)


RULES: dict[type, Callable[[Translation, Node], Collection]] = {
    beam.Impulse: _impulse, beam.Create: _create, beam.ParDo: _par_do, beam.Reshuffle: _reshuffle,
    beam.Flatten: _flatten, beam.GroupByKey: _group_by_key, beam.CombineGlobally: _combine_globally,
}  # fmt: skip
