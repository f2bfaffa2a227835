"""The draft: streams are found and sampled, given roles, and the schema written with a reason beside each guess."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from features.errors import UserError
from features.parse.compute import number
from features.printable import printable
from features.schema.schema import Schema
from features.yaml_text import parse_yaml
from pipeline.ingest.draft import labels
from pipeline.ingest.draft.column import Column
from pipeline.ingest.draft.config import DraftConfig
from pipeline.ingest.draft.dialect import NoLogError
from pipeline.ingest.draft.division import division_of
from pipeline.ingest.draft.features import Features, features_of
from pipeline.ingest.draft.groups import Group, apart, find_groups
from pipeline.ingest.draft.labels import Label
from pipeline.ingest.draft.page import written
from pipeline.ingest.draft.roles import Roles, Stream, roles_of, stream_of
from pipeline.ingest.draft.sample import Sample, sample_of
from pipeline.storage.files import write_text

MAX_STREAMS = 50
MAX_APART = 20  # files of one pattern with different columns that are streams of their own


@dataclass(frozen=True)
class Drafted:
    """What was written.

    Attributes:
        lines: what was found, for the terminal.
        schema: as it was read back.
    """

    lines: list[str]
    schema: Schema


def draft(config: DraftConfig) -> Drafted:
    """Samples the files below `input` and writes a first schema.

    Raises:
        UserError: there are no logs, no label was found, or `out` cannot be written; then nothing is.
    """
    check_out(config)
    streams, others = _streams(config)
    if not streams:
        shown = "; ".join(f"{pattern} {why}" for pattern, why in others[:5])
        raise UserError(f"{config.input}: no file that is a log: {shown}. Set input=FOLDER, or files=PATTERN.")
    roles = roles_of(streams, config.impressions, config.key, config.event_time)
    first = roles.impressions
    if config.label is not None:
        tasks = [labels.given(first, config.label)]
    else:
        tasks = labels.seen(first)
        if not tasks and not roles.outcomes:
            raise labels.none_seen(config.input, first)
    features = _features(roles, tasks)
    if not features.found:
        raise UserError(
            f"{config.input}: no column of {first.pattern} can be a feature. "
            + "; ".join(f"{name} {why}" for name, why in list(features.left_out.items())[:10])
        )
    page = written(config, roles, tasks, features, division_of(first, roles.event_time, roles.key), others)
    content = page.text()
    schema = Schema.parse(parse_yaml(content.encode(), config.out.name)["schema"], where=config.out.name)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, content)
    return Drafted(_summary(roles, tasks, features, others), schema)


def check_out(config: DraftConfig) -> None:
    """Raises UserError where the file is there already, or --config-dir would not read it."""
    out = config.out
    if re.match(r"\w+:/", str(out)):
        raise UserError(f"out={out}: a draft is a file on this machine, such as my/conf/data/mine.yaml")
    if out.suffix != ".yaml" or out.absolute().parent.name != "data":
        raise UserError(
            f"out={out}: a schema is read from DIR/data/NAME.yaml: write it so, such as my/conf/data/mine.yaml"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", out.stem):
        raise UserError(f"out={out}: data=NAME takes letters, digits, `_`, `-` and dots: choose another name")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists. Choose another out=, or set overwrite=true to replace it.")
    if "${" in config.input:
        raise UserError(
            f"input={config.input}: a configuration takes ${{ for a reference: give the folder another name"
        )


def _streams(config: DraftConfig) -> tuple[list[Stream], list[tuple[str, str]]]:
    """The streams below the input folder, and the patterns of other files with the reason why they are none."""
    groups = find_groups(config.input, config.files)
    if len(groups) > MAX_STREAMS:
        raise UserError(
            f"{config.input}: files of {len(groups):,} kinds, more than the {MAX_STREAMS} that a draft is made for: "
            f"{', '.join(group.pattern for group in groups[:5])}, … Name those that matter: files=PATTERN,PATTERN."
        )
    samples, others = list[Sample](), list[tuple[str, str]]()
    for group in groups:
        try:
            found = [sample_of(each) for each in _by_columns(config, group)]
        except NoLogError as error:
            others.append((group.pattern, str(error)))
            continue
        samples += found
    return [stream_of(sample) for sample in samples], others


def _by_columns(config: DraftConfig, group: Group) -> Sequence[Group]:
    """A group, or where its first and last file have no column in common a group for each file."""
    if config.files is not None or not 1 < len(group.files) <= MAX_APART or "{date}" in group.pattern:
        return [group]
    first, last = (sample_of(Group(group.pattern, [file], [])) for file in (group.files[0], group.files[-1]))
    return [group] if set(first.columns) == set(last.columns) else apart(config.input, group)


def _features(roles: Roles, tasks: Sequence[Label]) -> Features:
    first = roles.impressions
    used = {name: f"is read by the label of {task.name}" for task in tasks for name in task.columns}
    used |= {label.columns[0]: "is a label by its name" for label in labels.seen(first) if label.columns[0] not in used}
    if roles.key:
        used[roles.key.name] = "is the key"
    if roles.event_time:
        used[roles.event_time.name] = "is the event time"
    return features_of(list(first.columns.values()), used, tasks, _answers(first, tasks))


def _answers(stream: Stream, tasks: Sequence[Label]) -> pl.Series | None:
    """The first label of each row of the sample."""
    if not tasks:
        return None
    columns: list[Column] = [stream.columns[name] for name in tasks[0].columns]
    frame = pl.DataFrame([c.values if c.name in tasks[0].numbers else c.values.cast(pl.String) for c in columns])
    return number(frame, "label", tasks[0].expression, "label")


def _summary(roles: Roles, tasks: Sequence[Label], features: Features, others: Sequence[tuple[str, str]]) -> list[str]:
    first = roles.impressions
    lines = [f"impressions  {_described(first)}: {roles.why}"]
    for outcome in roles.outcomes:
        matched = f"{outcome.matched:,} of {outcome.of:,} sampled values of {outcome.key.name} match"
        lines.append(f"outcome      {outcome.name}: {_described(outcome.stream)}: {matched}")
    for table in roles.tables:
        versions = f", versions by {table.valid_from.name}" if table.valid_from else ""
        lines.append(f"side table   {_described(table.stream)}: by {table.key.name}{versions}")
    lines += [f"label        {task.name}: {task.expression} ({task.kind}), {task.why}" for task in tasks]
    kinds: dict[str, int] = {}
    for feature in features.found:
        kinds[feature.section] = kinds.get(feature.section, 0) + 1
    counted = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    lines.append(f"features     {counted}; columns left out: {len(features.left_out)}")
    lines += [f"not used     {pattern}: {why}" for pattern, why in [*roles.others, *others]]
    return [printable(line) for line in lines]


def _described(stream: Stream) -> str:
    files = stream.sample.group.files
    return f"{stream.pattern}, {len(files):,} file{'s' * (len(files) > 1)}, about {stream.sample.rows:,} rows"
