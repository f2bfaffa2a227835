"""model_card.md of a package: what the model predicts, on which data and how it was trained, how good it is, its limits.

Everything is taken from the run, the dataset and the package's manifest, so the same checkpoint gives the same card. Texts of
them may be anyone's: they are escaped.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from tabulate import tabulate

from features.errors import UserError
from features.printable import printable
from features.schema.schema import SPLITS, Schema
from pipeline.dataset.card.card import read_card
from pipeline.dataset.dataset import Dataset
from pipeline.overrides import dotted
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.headline import HEADLINE, RANKING
from pipeline.run.records import Record, latest
from pipeline.run.run import Run
from pipeline.serving.manifest import Manifest

NORMAL_95 = 1.959964  # quantile of the normal distribution: half the width of a 95% interval in standard errors
SHOWN = ("ne", "auc", "calibration", "nrmse", "r2")
# What is markup inside a line or a cell; underscores within words are none.
MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
LONGEST = 300  # characters of a text from outside
TRAINING = ("train.", "model.")
BITS = {"fp32": "32-bit", "fp16": "16-bit", "int8": "8-bit", "int4": "4-bit"}


def records_of(run: Run, trained: CheckpointManifest, dataset: str) -> dict[str, Record]:
    """The newest record of a checkpoint on each whole split of a dataset, by its name. Raises UserError for a damaged line."""
    found = {}
    for split in SPLITS:
        line = latest(run, split, dataset).get(trained.step)
        if line is not None and line["checkpoint"] == trained.checksum:
            found[str(split)] = Record.model_validate(line, strict=True)
    return dict(sorted(found.items()))


def metrics_of(records: Mapping[str, Record]) -> dict[str, dict[str, dict[str, float]]]:
    """Per split, task and metric the values that are defined."""
    return {
        split: {task: {n: v for n, v in values.items() if v is not None} for task, values in record.metrics.items()}
        for split, record in records.items()
    }


def model_card(run: Run, trained: CheckpointManifest, dataset: Dataset, manifest: Manifest) -> str:
    """The card of a checkpoint's package. manifest: complete but for its files."""
    records = records_of(run, trained, dataset.name)
    sections = {
        f"Model card: {escaped(run.path.name)}, step {trained.step:,}": _summary(trained, manifest),
        "What it predicts": _tasks(dataset.schema),
        "Inputs": _inputs(dataset.schema, manifest),
        "Training data": _data(dataset),
        "Training": _training(run, trained),
        "Evaluation": _evaluation(records, dataset.name),
        "Package": _package(manifest),
        "Limits": _limits(dataset.schema, records, manifest),
        "Versions": _table([[escaped(name), escaped(v)] for name, v in manifest.versions.items()], ["", "version"]),
    }
    text = ""
    for number, (title, lines) in enumerate(sections.items()):
        text += f"{'##' if number else '#'} {title}\n\n" + "\n".join(lines) + "\n\n"
    return text.rstrip("\n") + "\n"


def escaped(text: object) -> str:
    """A text on one line that means no markup in Markdown, nor HTML."""
    shown = printable(" ".join(str(text).split()))
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(lambda found: f"\\{found[0]}", shown)


def _table(lines: Sequence[Sequence[str]], header: Sequence[str]) -> list[str]:
    if not lines:
        return ["None."]
    return [tabulate(lines, header, tablefmt="pipe", disable_numparse=True)]


def _summary(trained: CheckpointManifest, manifest: Manifest) -> Iterator[str]:
    tasks = ", ".join(escaped(name) for name in manifest.tasks)
    yield f"A multi-task ranking model of {len(manifest.tasks)} tasks ({tasks}), trained on {trained.rows:,} rows."
    yield ""
    yield f"Checkpoint {trained.checksum}, schema {trained.fingerprint}, encoders {trained.encoders}."


def _tasks(schema: Schema) -> list[str]:
    kinds = {"binary": "probability that the label is 1", "regression": "the label, in its unit"}
    lines = [
        [escaped(name), task.kind, kinds[task.kind], escaped(task.label), _condition(task.observed_when, task.given)]
        for name, task in schema.tasks.items()
    ]
    return _table(lines, ["task", "kind", "answer", "label", "learnt where"])


def _condition(observed_when: str | None, given: str | None) -> str:
    parts = [escaped(observed_when)] if observed_when else []
    parts += [f"{escaped(given)} is 1"] if given else []
    return " and ".join(parts) or "always"


def _inputs(schema: Schema, manifest: Manifest) -> list[str]:
    tables = {part.feature: manifest.tables[part.table] for part in manifest.lookups}
    lines = []
    for name, feature in schema.features.items():
        raw, table = feature.raw(name, schema), tables.get(name)
        size = f"{table.num_embeddings:,} x {table.dim}" if table else ""
        lines.append([escaped(name), feature.section, escaped(raw.column), raw.type, size])
    head = ["feature", "kind", "raw column", "type", "table (rows x width)"]
    return [*_table(lines, head), "", "A value that is absent counts as missing, as in training."]


def _data(dataset: Dataset) -> Iterator[str]:
    manifest = dataset.manifest
    yield f"Dataset {escaped(dataset.name)}" + (f", {len(dataset.days)} days." if dataset.days else ".")
    yield ""
    lines = []
    for split in SPLITS:
        means = ", ".join(
            f"{escaped(task)} {manifest.positives[split][task] / observed:.4g} of {observed:,}"
            for task in dataset.schema.tasks
            if (observed := manifest.observed.get(split, {}).get(task))
        )
        lines.append([split, f"{manifest.rows.get(split, 0):,}", means or "-"])
    yield from _table(lines, ["split", "rows", "mean of observed labels"])
    yield ""
    yield f"Rows read: {manifest.read.get('impressions', 0):,}; bad rows left out: {sum(manifest.dead_letters.values()):,}."
    yield from _missing(dataset)


def _missing(dataset: Dataset) -> Iterator[str]:
    """Features that are missing most often in the train split, by the data card; of several days each has its own."""
    if dataset.days:
        return
    try:
        card = read_card(dataset.encoded_by)
    except UserError:  # a dataset of an earlier release may have none
        return
    shares = {
        name: entry["missing"]
        for section in ("numbers", "ids", "others")
        for name, entry in card.get(section, {}).items()
        if entry["missing"]
    }
    if shares:
        most = sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        yield ""
        yield "Missing most often: " + ", ".join(f"{escaped(name)} {share:.1%}" for name, share in most) + "."


def _training(run: Run, trained: CheckpointManifest) -> Iterator[str]:
    yield (
        f"{trained.rows:,} rows in {trained.step:,} steps of {trained.batch_size:,} rows, epoch {trained.epoch}, on "
        f"{trained.ranks} {'rank' if trained.ranks == 1 else 'ranks'}, seed {trained.seed}."
    )
    yield ""
    settings = [(key, value) for key, value in dotted(run.config()) if key.startswith(TRAINING) and value is not None]
    yield from _table([[escaped(key), escaped(value)] for key, value in settings], ["setting", "value"])


def _evaluation(records: Mapping[str, Record], dataset: str) -> Iterator[str]:
    if not records:
        yield f"Not evaluated: jobs.evaluate has no record of this checkpoint on {escaped(dataset)}."
        return
    for split, record in records.items():
        rows = "" if record.rows_evaluated is None else f", {record.rows_evaluated:,} rows"
        yield f"Split {escaped(split)} of {escaped(record.dataset)}{rows}. Intervals are of 95%, where they are known."
        yield ""
        names = [name for name in SHOWN if any(name in metrics for metrics in record.metrics.values())]
        lines = [[escaped(task), *(_value(record, task, name) for name in names)] for task in record.metrics]
        yield from _table(lines, ["task", *(escaped(name.upper()) for name in names)])
        yield ""
    best = f"{HEADLINE['binary'].upper()} and {HEADLINE['regression'].upper()}"
    yield f"{best}: lower is better, 1 is the mean label. {RANKING['binary'].upper()} and R2: higher is better."


def _value(record: Record, task: str, name: str) -> str:
    value = record.metrics[task].get(name)
    error = ((record.intervals or {}).get(task) or {}).get(name)
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {NORMAL_95 * error:.4f}"


def _package(manifest: Manifest) -> Iterator[str]:
    rows = sum(table.rows for table in manifest.tables.values())
    kept = any(table.kept for table in manifest.tables.values())
    yield (
        f"{len(manifest.tables)} tables with {rows:,} rows, {BITS[manifest.format]} numbers"
        + (", of the ids that occur in the train split alone." if kept else ".")
    )
    yield ""
    yield "Differences between the package and the checkpoint, on rows of the dataset:"
    yield ""
    yield from _table(
        [[escaped(name), f"{value:.6g}"] for name, value in manifest.tolerances.items()], ["", "measured"]
    )


def _limits(schema: Schema, records: Mapping[str, Record], manifest: Manifest) -> Iterator[str]:
    yield "- Answers are estimates for rows like those of the training data, from the same log and of about the same time."
    if "test" not in records:
        yield "- No figure of the test split is recorded for this checkpoint."
    for name, task in schema.tasks.items():
        if task.observed_when or task.given:
            yield (
                f"- {escaped(name)} was learnt from rows alone where {_condition(task.observed_when, task.given)}; on others "
                "its answers cannot be checked with these labels."
            )
    if any(table.kept for table in manifest.tables.values()):
        yield "- Ids that did not occur in training have no row: their embedding is zero."
    if manifest.format != "fp32":
        yield f"- Tables are rounded to {BITS[manifest.format]} numbers; the differences above say what that changes."
    yield "- Values outside of a vocabulary share the ids of unknown values; hash tables may give two values one id."
    yield "- Fairness across groups of people is not examined here: jobs.evaluate slices=[…] measures it."
