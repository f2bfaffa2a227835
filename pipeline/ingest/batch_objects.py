"""Record batches in one object of a store: put at once, and read a batch at a time by its range.

The batches come first, then their index: their schema, where each of them begins and the last one ends, their number and the
bytes of the schema (int64). So the last bytes of an object say where its batches are, and a process asks for them once. Of
columns with dictionaries each batch is a stream with a schema of its own, and the index has none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.storage.patience import patiently
from pipeline.storage.store_path import StorePath

TAIL_BYTES = 1 << 16  # that are asked for as an index, of a small object all; a larger index takes a second request
MOST_BOUNDS = 1 << 22  # of batches that a process remembers, 8 bytes each

Index = tuple[pa.Schema | None, np.ndarray]  # and where batches begin and end: [batches + 1]
_known: dict[str, Index] = {}


def write(path: StorePath, batches: Sequence[pa.RecordBatch]) -> None:
    """Puts batches of one schema, at least one."""
    alone = any("dictionary<" in str(field.type) for field in batches[0].schema)
    parts = [_stream(batch) if alone else batch.serialize() for batch in batches]
    bounds = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
    schema = b"" if alone else batches[0].schema.serialize().to_pybytes()
    sizes = np.array([len(parts), len(schema)], np.int64)
    path.write_bytes(b"".join([*parts, schema, bounds.tobytes(), sizes.tobytes()]))


def _stream(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def read(path: StorePath) -> pa.Table:
    """The first batch of an object, which is read whole in one request."""
    content = path.read_bytes()
    schema, bounds = _parsed(content[-_index_bytes(content) :])
    return _table(content[: bounds[1]], schema)


def read_each(paths: Sequence[StorePath], batches: Sequence[int]) -> list[pa.Table]:
    """One batch of each object, all asked for at once, as are the indexes that this process has not seen yet."""
    indexes, tails = _indexes(paths)
    contents, missing = dict[int, bytes](), dict[int, tuple[int, int]]()
    for number, (path, batch) in enumerate(zip(paths, batches, strict=True)):
        bounds = indexes[str(path)][1]
        start, stop = bounds[batch : batch + 2].tolist()
        begin, tail = tails.get(str(path), (stop, b""))
        if begin <= start:
            contents[number] = tail[start - begin : stop - begin]
        else:
            missing[number] = start, stop
    starts, stops = zip(*missing.values(), strict=True) if missing else ((), ())
    contents |= zip(missing, _ranges([paths[number] for number in missing], starts, stops), strict=True)
    return [_table(contents[number], indexes[str(path)][0]) for number, path in enumerate(paths)]


def _indexes(paths: Sequence[StorePath]) -> tuple[dict[str, Index], dict[str, tuple[int, bytes]]]:
    """The indexes of objects, and of those that were asked for now the place and content of their last bytes."""
    seen = dict[str, tuple[int, bytes]]()
    found = {str(path): _known[str(path)] for path in paths if str(path) in _known}
    new = [path for path in dict.fromkeys(paths) if str(path) not in found]
    tails = _ranges(new, [-TAIL_BYTES] * len(new), [None] * len(new))
    for path, tail in zip(new, tails, strict=True):
        size = _index_bytes(tail)
        if size > len(tail):
            [tail] = _ranges([path], [-size], [None])
        found[str(path)] = _parsed(tail[-size:])
        seen[str(path)] = int(found[str(path)][1][-1]) + size - len(tail), tail
    if sum(len(bounds) for _, bounds in (*_known.values(), *found.values())) > MOST_BOUNDS:
        _known.clear()
    _known.update(found)
    return found, seen


def _index_bytes(tail: bytes) -> int:
    batches, schema = np.frombuffer(tail[-16:], np.int64).tolist()
    return schema + 8 * (batches + 1) + 16


def _parsed(index: bytes) -> Index:
    _, schema = np.frombuffer(index[-16:], np.int64).tolist()
    columns = pa.ipc.read_schema(pa.py_buffer(index[:schema])) if schema else None
    return columns, np.frombuffer(index[schema:-16], np.int64)


def _table(content: bytes, schema: pa.Schema | None) -> pa.Table:
    if schema is None:
        return pa.ipc.open_stream(content).read_all()
    return pa.Table.from_batches([pa.ipc.read_record_batch(pa.py_buffer(content), schema)])


def _ranges(paths: Sequence[StorePath], starts: Sequence[int], stops: Sequence[Any]) -> list[bytes]:
    """A range of each object, all asked for at once."""
    if not paths:
        return []
    system, keys = paths[0].system, [path.key for path in paths]
    return patiently(paths[0], system.cat_ranges, keys, list(starts), list(stops), on_error="raise")
