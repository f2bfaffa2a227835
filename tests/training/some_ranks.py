"""What some ranks do, for test_rank_counts.py: python -m jobs.launch --nproc-per-node=RANKS some_ranks.py FOLDER

FOLDER holds the dataset `data`; the runs beside it are taken further by each number of ranks, and their rows recorded.
"""

import json
from pathlib import Path

import torch.distributed as dist
from tiny_training import on_each_rank
from two_ranks import train

ENDS = {
    3: 16,
    2: 22,
    1: 30,
}  # the last step by number of ranks: all of them have a part of the second epoch, which ends at 26
BY_RANK = {"batch_size": None, "rank_batch_size": 10, "lanes": None, "window": None}
RUNS = {"handed-on": {}, "by-rank": BY_RANK}  # 32 rows over 4 lanes: on three ranks 10, 11 and 11


def main(folder: Path) -> None:
    ranks = dist.get_world_size()
    for name, settings in RUNS.items():
        seen = train(folder, name, max_steps=ENDS[ranks], **settings).seen
        (folder / f"{name}.{ranks}.{dist.get_rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    on_each_rank(main)
