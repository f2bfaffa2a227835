"""The one workload on which every trainer is timed: 16 Zipf id columns, 8 dense values, 2 learnable binary tasks."""

import numpy as np
from numpy.typing import NDArray

ROWS = 400_000
TABLE_ROWS = tuple(int(size) for size in np.geomspace(1_000, 100_000, 16).round())  # ids per column
DENSE = 8
TASKS = 2
WIDTH = 16  # of one embedding
IN_DIM = len(TABLE_ROWS) * WIDTH + DENSE
BATCH = 4096  # rows a rank and step
EXPERT_DIMS = (256, 128)
TOWER_DIM = 64
MMOE_EXPERTS = 4
PLE_OWN, PLE_SHARED = 2, 2  # experts per task, experts of all
CATS = tuple(f"cat_{i}" for i in range(len(TABLE_ROWS)))
DENSES = tuple(f"dense_{i}" for i in range(DENSE))
LABELS = tuple(f"label_{i}" for i in range(TASKS))


def rows(seed: int = 0, count: int = ROWS) -> dict[str, NDArray[np.generic]]:
    """Draw rows; `pyarrow.table(rows())` is the same as a table.

    Args:
        seed: decides every value; the law by which labels follow from features is the same for all seeds.
        count: number of rows.
    Returns: cat_* int64, dense_* float32, label_* float32 (0 or 1; about 30% and 10% are 1).
    """
    law, draw = np.random.default_rng(20), np.random.default_rng(seed)
    logit = np.tile(np.array([[-1.2], [-3.3]]), count)  # one row a task
    columns: dict[str, NDArray[np.generic]] = {}
    for name, size in zip(CATS, TABLE_ROWS, strict=True):
        cdf = np.cumsum(1 / np.arange(1, size + 1) ** 1.05)
        rank = np.searchsorted(cdf, draw.random(count) * cdf[-1])
        columns[name] = law.permutation(size)[rank]  # as from a hash: frequent ids are no neighbours in memory
        shared, own = law.normal(0, 0.35, size), law.normal(0, 0.25, (TASKS, size))
        logit += (shared + own)[:, columns[name]]
    dense = draw.standard_normal((DENSE, count), dtype=np.float32)
    columns.update(zip(DENSES, dense, strict=True))
    logit += law.normal(0, 0.3, (TASKS, DENSE)) @ dense + 0.5 * dense[0] * dense[1]
    label = draw.random((TASKS, count)) < 1 / (1 + np.exp(-logit))
    columns.update(zip(LABELS, label.astype(np.float32), strict=True))
    return columns
