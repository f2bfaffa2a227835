"""The contender in DuckDB: SQL, vocabularies looked up by joins."""

from pathlib import Path

import duckdb
import ingest_workload as w


def fit(log: Path) -> duckdb.DuckDBPyConnection:
    """A connection that has the tables log, vocabulary_COLUMN (value, id) and moments.

    The log is kept as a table: to parse it a second time takes longer than to count all columns of it.
    """
    connection = duckdb.connect()
    connection.execute("SET threads = 1; SET preserve_insertion_order = false")
    kinds = {"int64": "BIGINT", "double": "DOUBLE", "string": "VARCHAR"}
    columns = {name: kinds[str(kind)] for name, kind in w.TYPES.items()}
    connection.execute(
        f"CREATE TABLE log AS FROM read_csv('{log / w.IMPRESSIONS}', header = true, columns = {columns})"
    )
    train = f"log WHERE event_time < {w.VALID_FROM}"
    for name in w.IDS:
        connection.execute(f"""
            CREATE TABLE vocabulary_{name} AS
            SELECT {name} AS value, row_number() OVER (ORDER BY count(*) DESC, {name}) + {w.UNKNOWN} AS id
            FROM {train} AND {name} IS NOT NULL GROUP BY {name} HAVING count(*) >= {w.MIN_COUNT}""")
    moments = (f"avg(ln(1 + {n})) AS {n}_mean, stddev_pop(ln(1 + {n})) AS {n}_std" for n in w.NUMBERS)
    connection.execute(f"CREATE TABLE moments AS SELECT {', '.join(moments)} FROM {train}")
    return connection


def encode(log: Path, out: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Writes what DuckDB makes of three splits."""
    numbers = (f"coalesce((ln(1 + {n}) - {n}_mean) / {n}_std, 0)::FLOAT AS {n}" for n in w.NUMBERS)
    ids = (f"CASE WHEN log.{n} IS NULL THEN 0 ELSE coalesce(v_{n}.id, {w.UNKNOWN}) END AS {n}" for n in w.IDS)
    joins = "\n".join(f"LEFT JOIN vocabulary_{n} AS v_{n} ON log.{n} = v_{n}.value" for n in w.IDS)
    connection.execute(f"""
        COPY (
            SELECT {", ".join(numbers)}, {", ".join(ids)}, click::FLOAT AS "label.click", 1::FLOAT AS weight, event_time,
                   impression_id AS row_id,
                   CASE WHEN event_time < {w.VALID_FROM} THEN 'train' WHEN event_time < {w.TEST_FROM} THEN 'valid'
                        ELSE 'test' END AS split
            FROM log CROSS JOIN moments {joins}
        ) TO '{out}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {w.ROW_GROUP}, PARTITION_BY (split))""")
