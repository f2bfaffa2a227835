"""The steps of the job: what is done to a unit of a raw file, a part of its rows, a bucket of keys, or a shard.

    read     unit    raw text to typed rows in parts on disk; their keys, and outcomes, dealt to buckets
    join     bucket  keys and outcomes of the bucket to joined columns, sent back to the parts
    remember part    what became of a part's rows, dealt to buckets by user
    recall   bucket  earlier items of each user, sent back to the parts
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features import raw
from features.encoders import Encoders
from features.hashing import hash_integers
from features.history import recent
from features.outcomes import join
from features.raw import LINE, ROW, SPLIT
from features.schema import SPLITS, Schema, Split
from features.source import RawType
from features.statistics import Statistics
from pipeline.ingest import spill, writer
from pipeline.ingest.blocks import Reader
from pipeline.ingest.files import RawFile, Unit, check_unchanged
from pipeline.ingest.progress import Share

ROW_ID_STRIDE = 1 << 40  # row_id = number of the file * stride + place in it, where the schema names no row_id column
Work = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every step knows.

    Attributes:
        staging: folder that becomes the dataset; scratch/ in it holds what goes from step to step.
        buckets: of joins and histories.
        counts_all: whether statistics are of all rows, or of the train split.
    """

    schema: Schema
    staging: Path
    buckets: int
    order: writer.Order
    seed: int
    rows_per_row_group: int
    counts_all: bool
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # of one worker

    def aside(self, name: str) -> Path:
        """A file of this attempt."""
        return self.staging / "scratch" / f"{name}-{uuid.uuid4().hex}"

    @property
    def joins(self) -> bool:
        """Whether rows wait for something before they can be labelled."""
        return bool(self.schema.source.outcomes or self.schema.histories)

    @property
    def encoders(self) -> Encoders:
        """Loaded once a worker."""
        if "encoders" not in self.memory:
            self.memory["encoders"] = Encoders.load(self.staging / "encoders", self.schema)
        return self.memory["encoders"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "memory": {}}


# read


def read(job: Job, work: Work) -> Work:
    """Reads a unit: {stream, number, unit} to {lines, read, latest, parts, letters} and, without joins, what `label` gives."""
    stream, unit = work["stream"], Unit(**{**work["unit"], "file": RawFile(**work["unit"]["file"])})
    outcome = job.schema.source.outcomes.get(stream)
    form = job.schema.source.format_of(stream if outcome else None)
    types = job.schema.raw_types if outcome is None else {outcome.key: _key_type(job.schema), **outcome.types}
    columns = job.schema.raw_columns if outcome is None else list(types)
    types = {name: types.get(name, "string") for name in columns}
    codes = raw.code_columns(job.schema) if outcome is None else set()
    bags = {} if outcome else {n: bag for n, bag in job.schema.bag.items() if not bag.history}
    lists = {job.schema.feature_columns[name]: bag.separator for name, bag in bags.items()}
    note = Share(job.staging / "scratch" / "notes", work["number"]).note
    reader = Reader(unit, form, work["names"], types, lists, note)
    bad, parts, latest, count = [], [], [], 0
    for block in reader:
        typed = raw.type_columns(block.columns, types, codes, form, block.lines(), unit.first_row + block.row)
        part, letters = (
            _impressions(job, work, unit.number, typed.rows) if outcome is None else _events(job, stream, typed.rows)
        )
        parts.append(part)
        no_rows = [(line.line, line.reason, line.raw) for line in block.bad]
        bad += [raw.letters(*zip(*no_rows, strict=True) if no_rows else ()), typed.bad, letters]
        count += block.columns.num_rows + len(block.bad)
        time = job.schema.event_time if outcome is None else outcome.time
        if time and job.joins:
            times = raw.event_time(job.schema, typed.rows) if outcome is None else typed.rows[time]
            latest.append(pc.max(times).as_py())
    check_unchanged(unit.file)
    report = {"stream": stream, "file": unit.file.path, "lines": reader.lines, "read": count, "parts": parts}
    known = [time for time in latest if time is not None]
    return {**report, "latest": max(known, default=None), **_spilled_letters(job, bad)}


def _key_type(schema: Schema) -> RawType:
    return schema.raw_types.get(str(schema.source.key), "string")


def _impressions(job: Job, work: Work, file: int, rows: pa.Table) -> tuple[Work, pl.DataFrame]:
    """Spills a block of impressions, or labels it where nothing has to be waited for."""
    part = {"unit": work["number"], "rows": rows.num_rows, "row_id": file * ROW_ID_STRIDE}
    if not job.joins:
        return _labelled(job, part, rows)
    part["path"] = spill.write(job.aside("typed"), [rows])
    if job.schema.source.outcomes:
        key, time = str(job.schema.source.key), job.schema.event_time
        sent = {"key": raw.column(job.schema, rows, key), spill.PLACE: pa.array(np.arange(rows.num_rows))}
        part["keys"] = _sent(job, pa.table(sent | ({"time": raw.event_time(job.schema, rows)} if time else {})), "key")
    return part, raw.letters()


def _events(job: Job, name: str, rows: pa.Table) -> tuple[Work, pl.DataFrame]:
    """Deals a block of outcomes to buckets; those without a key or a time belong to no impression."""
    outcome = job.schema.source.outcomes[name]
    needed = [outcome.key, *([outcome.time] if outcome.time else [])]
    missing = [pl.Series(rows[column]).is_null() for column in needed]
    lost = missing[0] | missing[-1]
    letters = raw.letters()
    if lost.any():
        gone = rows.filter(lost.to_arrow())
        said = pl.Series(
            "reason",
            [
                f"{outcome.key}: missing key" if no_key else f"{outcome.time}: missing time"
                for no_key in missing[0].filter(lost)
            ],
        )
        letters = raw.letters(gone[LINE].to_numpy(), said, raw.as_json(gone.drop_columns([LINE, ROW])))
        rows = rows.filter((~lost).to_arrow())
    return {"rows": rows.num_rows, "path": _sent(job, rows.drop_columns([LINE, ROW]), outcome.key)}, letters


def _sent(job: Job, table: pa.Table, key: str) -> str:
    bucket_B = spill.bucket_of(table[key].combine_chunks(), job.buckets)
    return spill.write(job.aside("sent"), spill.dealt(table, bucket_B, job.buckets))


def _spilled_letters(job: Job, found: Sequence[pl.DataFrame]) -> Work:
    frame = pl.concat(found) if found else raw.letters()
    if not frame.height:
        return {"letters": None, "reasons": {}, "example": None}
    path = job.aside("letters")
    frame.write_ipc(path)
    reasons = Counter(_kind(reason) for reason in frame["reason"])
    return {"letters": str(path), "reasons": dict(reasons), "example": [frame["line"][0], frame["reason"][0]]}


def _kind(reason: str) -> str:
    """A reason without the value that caused it, so that equal causes are counted together."""
    name, _, rest = reason.partition(": ")
    return reason if not rest or rest.startswith(("set ", "missing")) else f"{name}: wrong value"


# join and histories


def join_bucket(job: Job, work: Work) -> Work:
    """Joins all outcomes in a bucket: {bucket, keys, events: {outcome: paths}} to {path, fates}."""
    sent = [spill.read(path, work["bucket"]) for path in work["keys"]]
    keys: pl.DataFrame = pl.from_arrow(pa.concat_tables(sent))  # type: ignore[assignment]
    joined, fates = keys.select(spill.PLACE), {}
    for name, outcome in job.schema.source.outcomes.items():
        types = {outcome.key: _key_type(job.schema), **outcome.types}
        events = [spill.read(path, work["bucket"]) for path in work["events"][name]]
        frame: pl.DataFrame = pl.from_arrow(pa.concat_tables(events))  # type: ignore[assignment]
        found = join(name, outcome, keys, frame.select(list(types)))
        joined, fates[name] = joined.hstack(found.columns), found.fates
    return {
        "bucket": work["bucket"],
        "fates": fates,
        "path": _reply(job, joined.rechunk().to_arrow(), [t.num_rows for t in sent]),
    }


def _reply(job: Job, table: pa.Table, sizes: Sequence[int]) -> str:
    table = table.combine_chunks()
    ends = np.cumsum(sizes)
    return spill.write(
        job.aside("reply"), [table.slice(stop - size, size) for stop, size in zip(ends, sizes, strict=True)]
    )


def remember(job: Job, work: Work) -> Work:
    """Sends a part's rows to the buckets of their users: {part, ...} to {part, path}."""
    rows = spill.read(work["path"])
    joined = _joined(work)
    time = job.schema.event_time
    sent: dict[str, Any] = {}
    for name, history in job.schema.histories.items():
        when = [history.when] if history.when else []
        frame = raw.view(job.schema, rows, joined, when, [str(time), history.user, history.item])
        known = frame[str(time)].cast(pl.Int64)
        counts = (
            pl.Series([True]).new_from_index(0, rows.num_rows)
            if not when
            else raw.truth(frame, f"bag.{name}.history.when", history.when or "")
        )
        for outcome in job.schema.outcomes_of(history.when) if history.when else ():
            assert joined is not None
            known = pl.select(pl.max_horizontal(known, joined[f"{outcome}_time"])).to_series()
        sent |= {
            f"{name}.user": frame[history.user].cast(pl.String),
            f"{name}.item": frame[history.item].cast(pl.String),
        }
        sent |= {
            f"{name}.known": known.set(~(counts & frame[history.item].is_not_null()), None),
            "time": frame[str(time)].cast(pl.Int64),
        }
    table = pl.DataFrame(sent).with_columns(pl.int_range(pl.len()).alias(spill.PLACE)).rechunk().to_arrow()
    paths = {
        name: _sent(
            job,
            table.select([spill.PLACE, "time", *(f"{name}.{c}" for c in ("user", "item", "known"))]),
            f"{name}.user",
        )
        for name in job.schema.histories
    }
    return {"part": work["part"], "paths": paths}


def recall(job: Job, work: Work) -> Work:
    """Earlier items of each row's user in a bucket: {bucket, history, paths} to {history, bucket, path}."""
    name = work["history"]
    sent = [spill.read(path, work["bucket"]) for path in work["paths"]]
    frame: pl.DataFrame = pl.from_arrow(pa.concat_tables(sent))  # type: ignore[assignment]
    user_I = frame[f"{name}.user"].rank("dense").cast(pl.Int64).fill_null(0).to_numpy()  # 0: nobody, who has no history
    known = frame[f"{name}.known"]
    event_E = np.flatnonzero(known.is_not_null().to_numpy() & (user_I > 0))
    time_I = frame["time"].fill_null(np.iinfo(np.int64).min).to_numpy()
    length = job.schema.bag[name].max_length
    offsets, event_V = recent(user_I, time_I, user_I[event_E], known.gather(event_E).to_numpy(), length)
    items = frame[f"{name}.item"].gather(event_E[event_V]).rechunk().to_arrow().cast(pa.large_string())
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), items)
    table = pa.table({spill.PLACE: frame[spill.PLACE].to_arrow(), name: lists})
    return {"history": name, "bucket": work["bucket"], "path": _reply(job, table, [t.num_rows for t in sent])}


def _joined(work: Work) -> pl.DataFrame | None:
    if not work.get("joined"):
        return None
    return pl.from_arrow(spill.returned(work["joined"], work["part"], work["rows"]))  # type: ignore[return-value]


# label


def label(job: Job, work: Work) -> Work:
    """Labels a part: {part, path, joined, histories, as_of} to {features, rows, left_out, statistics, letters}."""
    rows, joined = spill.read(work["path"]), _joined(work)
    histories = {
        name: spill.returned(paths, work["part"], work["rows"])[name].combine_chunks()
        for name, paths in work["histories"].items()
    }
    report, letters = _labelled(job, work, rows, joined, histories)
    return {**report, "part": work["part"], "unit": work["unit"], **_spilled_letters(job, [letters])}


def _labelled(
    job: Job,
    work: Work,
    rows: pa.Table,
    joined: pl.DataFrame | None = None,
    histories: dict[str, pa.Array] | None = None,
) -> tuple[Work, pl.DataFrame]:
    schema, young = job.schema, {}
    for name, outcome in schema.source.outcomes.items():
        if outcome.window and outcome.young != "keep":
            time = pl.Series(raw.event_time(schema, rows))
            young[name] = (time + outcome.window > work["as_of"]).fill_null(False).to_numpy()
    parsed = raw.parse(schema, rows, work["row_id"], joined, young, histories)
    split_B = parsed.rows[SPLIT].to_numpy()
    counted = parsed.rows if job.counts_all else parsed.rows.filter(pa.array(split_B == 0))
    statistics = job.aside("statistics")
    statistics.write_bytes(pickle.dumps(Statistics.of(schema, counted)))
    report = {
        "unit": work["unit"],
        "features": spill.write(job.aside("features"), [parsed.rows]),
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
    rows = spill.read(work["path"])
    tables, batches = [], []
    for split in SPLITS:
        ours = job.encoders.encode(_of_split(rows, split))
        slices = work["slices"][split]
        slice_B = _slice_of(job, ours, slices, work["bounds"].get(split))
        for number, table in enumerate(spill.dealt(ours, slice_B, slices)):
            tables.append(table)
            batches.append([split, number, table.num_rows])
    return {"path": spill.write(job.aside("encoded"), tables), "batches": batches}


def _of_split(rows: pa.Table, split: Split) -> pa.Table:
    mine = pc.equal(rows[SPLIT], SPLITS.index(split))
    return rows if pc.all(mine, min_count=0).as_py() else rows.filter(mine)


def _slice_of(job: Job, rows: pa.Table, slices: int, bounds: list[int] | None) -> np.ndarray:
    if job.order == "time":
        return np.searchsorted(np.array(bounds), rows["event_time"].to_numpy(), side="right")
    return spill.share_of(hash_integers(rows["row_id"].to_numpy(), job.seed), slices)


def write(job: Job, work: Work) -> Work:
    """Writes a shard: {split, shard, slices: lists of pieces} to {split, shard, described}."""
    path, split = job.aside("shard"), work["split"]
    if job.order == "input":  # what is not dealt to other shards is encoded only here
        tables = (_encoded(job, split, *piece) for pieces in work["slices"] for piece in pieces)
    else:
        slices = (pa.concat_tables(spill.read(p, batch) for p, batch, _ in pieces) for pieces in work["slices"])
        tables = (writer.ordered(rows, job.order, job.seed) for rows in slices)
    described = writer.write_shard(path, job.staging, split, job.schema, tables, job.rows_per_row_group)
    return {"split": split, "shard": work["shard"], "described": described.model_dump()}


def _encoded(job: Job, split: Split, path: str, start: int, count: int) -> pa.Table:
    return job.encoders.encode(_of_split(spill.read(path), split).slice(start, count))


STEPS = {
    "read": read, "join": join_bucket, "remember": remember, "recall": recall,
    "label": label, "merge": merge, "encode": encode, "write": write,
}  # fmt: skip
