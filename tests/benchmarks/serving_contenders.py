"""What a package is measured against: onnxruntime on torch-rechub's export, and LightGBM. Nothing of taskfuse is imported.

Needs requirements.txt, which `make .venv/rechub` installs apart from the environment.
"""

# Shapes: B rows, N rows of the data, F id columns, D dense columns, T tasks.

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EXPERT_DIMS, OWN, SHARED, TOWER = (128, 64), 1, 3, 32  # of jobs/conf/model/adatt.yaml
OPSET = 18  # as torch writes it: no conversion to another
TREES, LEAVES, LEARNING_RATE = 200, 63, 0.05


class Columns(NamedTuple):
    """Encoded rows.

    Attributes:
        id_NF: int64. dense_ND: float32. label_NT: float32, NaN where not observed.
    """

    id_NF: NDArray[np.int64]
    dense_ND: NDArray[np.float32]
    label_NT: NDArray[np.float32]

    def take(self, start: int, rows: int) -> "Columns":
        """Some rows that follow each other."""
        return Columns(*(part[start : start + rows] for part in self))


Scores = Callable[[Columns], Callable[[], object]]  # from rows to what scores them: their form is made beforehand


def rechub(folder: Path, table_rows: list[int], widths: list[int], dense: int, tasks: int) -> tuple[Scores, Path]:
    """torch-rechub's PLE, exported by its ONNXExporter, under onnxruntime with one thread.

    It has no AdaTT. Of its layers for PLE (CGC) two are put together at AdaTT's sizes: experts of 128 and then 64, one a task
    and three shared, towers of 32, after embeddings of the same widths: the same number of products a row. Its own constructor
    gives all levels one width. Weights are random: time does not depend on them. Its MLPs have batch normalisation, which
    onnxruntime folds into the products.

    Args:
        table_rows, widths: of each id column.
    Returns: what scores rows, from the ids of each column and the dense columns on; the file.
    """
    import onnxruntime
    import torch
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import PLE
    from torch_rechub.models.multi_task.ple import CGC
    from torch_rechub.utils.onnx_export import ONNXExporter

    torch.manual_seed(0)
    ids, numbers = [f"id_{i}" for i in range(len(table_rows))], [f"dense_{i}" for i in range(dense)]
    features = [SparseFeature(name, *sizes) for name, *sizes in zip(ids, table_rows, widths, strict=True)]
    features += [DenseFeature(name) for name in numbers]
    first, last = ({"dims": [width]} for width in EXPERT_DIMS)
    net = PLE(features, ["classification"] * tasks, 1, OWN, SHARED, last, [{"dims": [TOWER]}] * tasks)
    levels = [CGC(1, 2, tasks, OWN, SHARED, net.input_dims, first), CGC(1, 1, tasks, OWN, SHARED, EXPERT_DIMS[0], last)]
    net.n_level, net.cgc_layers = len(levels), torch.nn.ModuleList(levels)
    file = folder / "rechub.onnx"
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # of each operator of torchvision, which nothing here needs
        ONNXExporter(net).export(str(file), opset_version=OPSET)
    logging.disable(logging.NOTSET)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    taken = {given.name for given in session.get_inputs()}

    def scores(rows: Columns) -> Callable[[], object]:
        columns = dict(zip(ids, np.ascontiguousarray(rows.id_NF.T), strict=True))
        columns |= dict(zip(numbers, np.ascontiguousarray(rows.dense_ND.T)[..., None], strict=True))
        feed = {name: values for name, values in columns.items() if name in taken}
        return lambda: session.run(None, feed)

    return scores, file


def lightgbm(folder: Path, train: Columns) -> tuple[Scores, list[Path]]:
    """A model of LightGBM a task: 200 trees of 63 leaves on the same columns, ids as categories; one thread.

    Returns: what scores rows of one matrix (its answers are prob_BT); the files.
    """
    import lightgbm as lgb

    ids = train.id_NF.shape[1]
    settings = {"objective": "binary", "num_leaves": LEAVES, "learning_rate": LEARNING_RATE, "seed": 0, "verbosity": -1}
    settings["num_threads"] = 1
    names = [f"column_{i}" for i in range(ids + train.dense_ND.shape[1])]
    models, files = [], []
    for task, label_N in enumerate(train.label_NT.T):
        observed = ~np.isnan(label_N)
        data = lgb.Dataset(
            _matrix(train)[observed], label_N[observed], feature_name=names, categorical_feature=names[:ids]
        )
        model = lgb.train(settings, data, TREES)
        files.append(folder / f"lightgbm-{task}.txt")
        model.save_model(files[-1])
        models.append(lgb.Booster(model_file=files[-1]))

    def scores(rows: Columns) -> Callable[[], object]:
        x_BC = _matrix(rows)
        return lambda: np.stack([model.predict(x_BC, num_threads=1) for model in models], 1)

    return scores, files


def _matrix(rows: Columns) -> NDArray[np.float32]:
    return np.concatenate([rows.id_NF.astype(np.float32), rows.dense_ND], 1)


def one_thread() -> dict[str, str]:
    """The environment in which every library of a contender computes on one thread."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, "1")}
