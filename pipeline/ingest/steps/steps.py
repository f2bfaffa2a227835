"""The steps of the job: what is done to a unit of a raw file, a part of its rows, a bucket of keys, or a shard.

    read     unit    raw text to typed rows in parts on disk; their keys, and outcomes, dealt to buckets
    join     bucket  keys and outcomes of the bucket to joined columns, sent back to the parts
    scatter_history  part    rows with what became of them, partitioned by user
    gather_history   bucket  earlier items of each user, sent back to the parts
    label    part    typed rows and what came back to features, labels, split; counted
    merge    counts  those of many parts to one
    encode   part    features to ids and numbers, dealt to shards
    write    shard   rows in their order as Parquet

Rows stay where they are: only keys travel to the buckets, and what is found there back. A step takes and gives small
dictionaries, which name files that are written once under a name of their own: an attempt that failed is named by none.
"""

import pickle
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.fit.statistics import Statistics
from features.hashing import hash_integers
from features.parse import raw
from features.parse.raw import LINE, ROW, SPLIT
from features.schema.schema import SPLITS, Split
from features.schema.source import RawType
from pipeline.ingest import shuffle
from pipeline.ingest.files import RawFile, Unit, check_unchanged
from pipeline.ingest.formats.blocks import Block, Reader
from pipeline.ingest.progress import Share
from pipeline.ingest.state import Job, Work
from pipeline.ingest.steps import join
from pipeline.ingest.steps import write as writer

ROW_ID_STRIDE = 1 << 40  # row_id = number of the file * stride + place in it, where the schema names no row_id column


def read(job: Job, work: Work) -> Work:
    """Reads a unit: {stream, number, unit, names} to {stream, file, lines, read, latest, parts, dead_letters}.

    `latest` is the last time of an impression. Without joins a part is what `label` gives.
    """
    stream, unit = work["stream"], Unit(**{**work["unit"], "file": RawFile(**work["unit"]["file"])})
    outcome = job.schema.source.outcomes.get(stream)
    form = job.schema.source.format_of(stream if outcome else None)
    types = _types(job, stream)
    codes = set() if outcome else raw.code_columns(job.schema)
    lists = {} if outcome else raw.list_columns(job.schema)
    reader = Reader(unit, form, work["names"], types, lists, Share(job.scratch / "notes", work["number"]).note)
    bad, parts, latest, count = [], [], [], 0
    for block in _blocks(reader, types):
        typed = raw.type_columns(block.columns, types, codes, form, block.lines(), unit.first_row + block.row)
        if outcome is None:
            part, dead_letters = _impressions(job, work, unit.number, typed.rows)
            if job.joins and job.schema.event_time:
                latest.append(pc.max(raw.event_time(job.schema, typed.rows)).as_py())
        else:
            part, dead_letters = _events(job, stream, typed.rows)
        parts.append(part)
        no_rows = [(line.line, line.reason, line.raw) for line in block.bad]
        bad += [raw.dead_letters(*zip(*no_rows, strict=True) if no_rows else ()), typed.bad, dead_letters]
        count += block.columns.num_rows + len(block.bad)
    check_unchanged(unit.file)
    report = {"stream": stream, "file": unit.file.path, "lines": reader.lines, "read": count, "parts": parts}
    last = max((time for time in latest if time is not None), default=None)
    return {**report, "latest": last, **_spill_dead_letters(job, bad)}


def _types(job: Job, stream: str) -> dict[str, RawType]:
    """The columns that are read of a stream."""
    if outcome := job.schema.source.outcomes.get(stream):
        return {outcome.key: join.key_type(job.schema), **outcome.types}
    return {name: job.schema.raw_types.get(name, "string") for name in job.schema.raw_columns}


def _blocks(reader: Reader, types: dict[str, RawType]) -> Iterator[Block]:
    """The blocks of a unit; where there are none, one without rows, since what follows needs the columns."""
    block = None
    for block in reader:
        yield block
    if block is None:
        yield Block(pa.table({name: pa.array([], pa.string()) for name in types}), 0, lambda: np.empty(0, np.int64))


def _impressions(job: Job, work: Work, file: int, rows: pa.Table) -> tuple[Work, pl.DataFrame]:
    """Spills a block of impressions, or labels it where nothing has to be waited for."""
    part = {"unit": work["number"], "rows": rows.num_rows, "row_id": file * ROW_ID_STRIDE}
    if not job.joins:
        return _labelled(job, part, rows)
    part["path"] = shuffle.write(job.aside("typed"), [rows])
    if job.schema.source.outcomes:
        part["keys"] = join.send_keys(job, rows)
    return part, raw.dead_letters()


def _events(job: Job, name: str, rows: pa.Table) -> tuple[Work, pl.DataFrame]:
    """Deals a block of outcomes to buckets; those without a key or a time belong to no impression."""
    outcome = job.schema.source.outcomes[name]
    if pa.types.is_nested(rows.schema.field(outcome.key).type):
        raise UserError(
            f"source.outcomes.{name}: its key {outcome.key} holds lists: name a column with one value a row"
        )
    needed = [outcome.key, *([outcome.time] if outcome.time else [])]
    missing = [pl.Series(rows[column]).is_null() for column in needed]
    lost = missing[0] | missing[-1]
    dead_letters = raw.dead_letters()
    if lost.any():
        gone = rows.filter(lost.to_arrow())
        words = {True: f"{outcome.key}: missing key", False: f"{outcome.time}: missing time"}
        said = missing[0].filter(lost).replace_strict(words, return_dtype=pl.String)
        dead_letters = raw.dead_letters(gone[LINE].to_numpy(), said, raw.as_json(gone.drop_columns([LINE, ROW])))
        rows = rows.filter((~lost).to_arrow())
    return {"path": join.send(job, rows.drop_columns([LINE, ROW]), outcome.key)}, dead_letters


def _spill_dead_letters(job: Job, found: Sequence[pl.DataFrame]) -> Work:
    frame = pl.concat(found) if found else raw.dead_letters()
    if not frame.height:
        return {"dead_letters": None, "reasons": {}, "example": None}
    path = job.aside("dead_letters")
    frame.write_ipc(path)
    reasons = Counter(_kind(reason) for reason in frame["reason"])
    first = frame.row(int(frame["line"].arg_min() or 0), named=True)
    return {"dead_letters": str(path), "reasons": dict(reasons), "example": [first["line"], first["reason"]]}


def _kind(reason: str) -> str:
    """A reason without the value that caused it, so that equal causes are counted together."""
    name, _, rest = reason.partition(": ")
    return reason if not rest or rest.startswith(("set ", "missing")) else f"{name}: wrong value"


def label(job: Job, work: Work) -> Work:
    """Labels a part: {part, path, rows, row_id, unit, as_of} to {features, rows, left_out, statistics, dead_letters}."""
    rows = shuffle.read(work["path"])
    joined = join.joined(job, work["part"], work["rows"])
    report, dead_letters = _labelled(job, work, rows, joined, join.histories(job, work["part"], work["rows"]))
    return {**report, **_spill_dead_letters(job, [dead_letters])}


def _labelled(
    job: Job,
    work: Work,
    rows: pa.Table,
    joined: pl.DataFrame | None = None,
    histories: dict[str, pa.Array] | None = None,
) -> tuple[Work, pl.DataFrame]:
    open_windows = {}
    for name, as_of in work.get("as_of", {}).items():
        closes = pl.Series(raw.event_time(job.schema, rows)) + job.schema.source.outcomes[name].window
        open_windows[name] = (closes > as_of).fill_null(False).to_numpy()
    parsed = raw.parse(job.schema, rows, work["row_id"], joined, open_windows, histories)
    split_B = parsed.rows[SPLIT].to_numpy()
    counted = parsed.rows if job.counts_all else parsed.rows.filter(pa.array(split_B == 0))
    statistics = job.aside("statistics")
    statistics.write_bytes(pickle.dumps(Statistics.of(job.schema, counted)))
    report = {
        "unit": work["unit"],
        "features": shuffle.write(job.aside("features"), [parsed.rows]),
        "rows": {name: int((split_B == code).sum()) for code, name in enumerate(SPLITS)},
        "left_out": parsed.left_out,
        "statistics": str(statistics),
        "times": _times(parsed.rows, split_B) if job.order == "time" else {},
    }
    return report, parsed.bad


def _times(rows: pa.Table, split_B: np.ndarray) -> dict[str, list[int]]:
    """Event times of each split at evenly spaced ranks, from which the bounds of shards are made."""
    time_B = rows["event_time"].to_numpy()
    found = {name: np.sort(time_B[split_B == code]) for code, name in enumerate(SPLITS)}
    return {name: t[np.linspace(0, len(t) - 1, 65).astype(np.int64)].tolist() for name, t in found.items() if len(t)}


def merge(_: Job, work: Work) -> Work:
    """Merges counts in the order of the parts, on which the last digits of sums depend: {number, paths} to {path}."""
    merged = Statistics().merge(*(pickle.loads(Path(path).read_bytes()) for path in work["paths"]))
    path = Path(work["paths"][0] + ".merged-" + uuid.uuid4().hex)
    path.write_bytes(pickle.dumps(merged))
    return {"number": work["number"], "path": str(path)}


# encode and write


def encode(job: Job, work: Work) -> Work:
    """Encodes a part: {path, slices: {split: count}, bounds: {split: times}} to {path, batches: [split, slice, rows]}."""
    rows = shuffle.read(work["path"])
    tables, batches = [], []
    for split in SPLITS:
        ours = job.encoders.encode(_of_split(rows, split))
        slices = work["slices"][split]
        slice_B = _slice_of(job, ours, slices, work["bounds"].get(split))
        for number, table in enumerate(shuffle.partition(ours, slice_B, slices)):
            tables.append(table)
            batches.append([split, number, table.num_rows])
    return {"path": shuffle.write(job.aside("encoded"), tables), "batches": batches}


def _of_split(rows: pa.Table, split: Split) -> pa.Table:
    mine = pc.equal(rows[SPLIT], SPLITS.index(split))
    return rows if pc.all(mine, min_count=0).as_py() else rows.filter(mine)


def _slice_of(job: Job, rows: pa.Table, slices: int, bounds: list[int] | None) -> np.ndarray:
    if job.order == "time":
        return np.searchsorted(np.array(bounds), rows["event_time"].to_numpy(), side="right")
    return shuffle.share_of(hash_integers(rows["row_id"].to_numpy(), job.seed), slices)


def write(job: Job, work: Work) -> Work:
    """Writes a shard: {split, shard, slices: lists of pieces} to {split, shard, described}."""
    path, split = job.aside("shard"), work["split"]
    if job.order == "input":  # what is not dealt to other shards is encoded only here
        tables = (_encoded(job, split, *piece) for pieces in work["slices"] for piece in pieces)
    else:
        slices = (
            pa.concat_tables(shuffle.read(p, batch, mapped=False) for p, batch, _ in pieces)
            for pieces in work["slices"]
        )
        tables = (writer.ordered(rows, job.order, job.seed) for rows in slices)
    described = writer.write_shard(path, job.staging, split, job.schema, tables, job.rows_per_row_group)
    return {"split": split, "shard": work["shard"], "described": described.model_dump()}


def _encoded(job: Job, split: Split, path: str, start: int, count: int) -> pa.Table:
    return job.encoders.encode(_of_split(shuffle.read(path), split).slice(start, count))


STEPS = {
    "read": read, "join": join.join_bucket, "scatter_history": join.scatter_history, "gather_history": join.gather_history,
    "label": label, "merge": merge, "encode": encode, "write": write,
}  # fmt: skip
