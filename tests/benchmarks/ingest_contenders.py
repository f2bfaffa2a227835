"""What jobs.preprocess is measured against: the same log to the same columns, taskfuse not imported.

    python tests/benchmarks/ingest_contenders.py arrow|polars|duckdb|beam-rows|beam-counters LOG OUT

reads LOG/rows-*.csv (see ingest_workload.py), writes OUT/*SPLIT/*.parquet, and prints the CPU seconds of its two passes as one
JSON line. A contender is a file with such a pair, `encode(log, out, fit(log))`, on one thread: `fit` counts the values of id
columns and takes the moments of numbers over the train split; `encode` goes over the rows again and writes zstd Parquet in
row groups of 8,192 (Beam's WriteToParquet knows bytes only). beam-counters also reads LOG/clicks-*.csv, and makes counters.

Ids: 0 missing, 1 unknown, then the values seen at least twice in train by falling count, equal counts by value. Numbers:
log1p, standardised, 0 where missing.
"""

import argparse
import importlib
import json
import os
import time
from pathlib import Path

NAMES = ("arrow", "polars", "duckdb", "beam-rows", "beam-counters")
CONTENDERS = {name: f"ingest_{name.replace('-', '_')}" for name in NAMES}


def main() -> None:
    """Loads one contender, and nothing of the others, and runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["POLARS_MAX_THREADS"] = (
        "1"  # read once, when Arrow and Polars are loaded
    )
    contender = importlib.import_module(CONTENDERS[args.name])
    marks = [time.process_time()]
    fitted = contender.fit(args.log)
    marks.append(time.process_time())
    contender.encode(args.log, args.out, fitted)
    marks.append(time.process_time())
    print(json.dumps({"fit_s": marks[1] - marks[0], "encode_s": marks[2] - marks[1]}))


if __name__ == "__main__":
    main()
