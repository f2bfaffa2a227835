"""What several ranks do, for test_scoring_ranks.py: python -m jobs.launch --nproc-per-node=N ranks_scoring.py FOLDER

FOLDER holds the runs of `make_runs`. Each rank scores its row groups of the valid split and writes FOLDER/CASE.N-RANK.pt.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_training import configuration, make_dataset, on_each_rank, write_checkpoint
from torch import Tensor, nn
from two_ranks_emm import fused, source
from two_ranks_managed import make_managed_dataset
from two_ranks_sequences import BAGS, FUSION

from features.batch import Batch
from features.errors import UserError
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation import lockstep, predictions
from pipeline.evaluation.lockstep import batches_in_step
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.weights import Loading, ModelWeights
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.torch_compat import table_kernels
from pipeline.training.parallel.scoring import shard_for_scoring
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

COLLECTIVES = {"all_reduce", "all_gather_object", "gather_object", "broadcast_object_list"}


class NcclDefault:
    """torch.distributed as evaluation would see it on GPUs: its messages, all of main memory, need a group of their own."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(dist, name)

        def collective(*arguments: Any, group: dist.ProcessGroup | None = None) -> Any:
            assert group is not None, f"{name} of a value in main memory by the default group, which is NCCL's on GPUs"
            return found(*arguments, group=group)

        return (lambda: "nccl") if name == "get_backend" else collective if name in COLLECTIVES else found


# By folder of the dataset.
FUSIONS: dict[str, dict[str, Any]] = {
    "plain/adatt": {"name": "adatt", "levels": [[8], [4]]},
    "plain/stem": {"name": "stem", "widths": [8]},
    "sequences/dtrn": FUSION,
    "managed/mmoe": {"name": "mmoe", "num_experts": 2, "levels": [[8]]},
}
EMM = "plain/emm"
TWO = "plain/two"  # whose checkpoint two ranks write
SOURCES = ("click-a", "conversion", "dwell")
CASES = (*FUSIONS, EMM, TWO)
BATCH = 16


def trainer(folder: Path, case: str, steps: int = 2) -> Trainer:
    """A run of a case, beside its dataset `data`."""
    place, name = case.split("/")
    made = configuration(folder / place / "data", folder / place / name, max_steps=steps)
    fusion = FUSIONS.get(case, FUSIONS["plain/adatt"])
    model = ModelConfig(fusion=fusion, tower=[8], embedding_std=0.1, field_dim=4)
    return prepare(made.model_copy(update={"model": model}), None, torch.device("cpu"))


def make_runs(folder: Path) -> None:
    """Datasets, and a run of each case but TWO."""
    make_dataset(folder / "plain" / "data")
    make_dataset(folder / "sequences" / "data", bag=BAGS)
    make_managed_dataset(folder / "managed" / "data")
    for case in FUSIONS:
        trainer(folder, case).run_to_end()
    for name in SOURCES:
        source(folder / "plain", name, max_steps=1).run_to_end()
    fused(folder / "plain", "emm", of=SOURCES, train={"max_steps": 2}, tables="tuned").run_to_end()


def weights(folder: Path, case: str, loading: Loading | None = None) -> ModelWeights:
    """With the newest checkpoint of a case."""
    run = Run(folder / case)
    made = ModelWeights(run, Dataset(folder / case.split("/")[0] / "data"), ["valid"], BATCH, loading)
    made.load(checkpoint.steps(run.checkpoints)[-1])
    return made


def scores(made: ModelWeights) -> tuple[Tensor, Tensor]:
    """row_id_N and logit_NT of this rank's rows."""
    reader = SplitReader(made.dataset, "valid", BATCH, made.rank, made.ranks)
    with torch.inference_mode():
        found = [(batch.row_id_B, made(batch)) for batch in made.in_step(reader.batches(), reader.empty)]
    if not found:  # a rank without a row group
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, len(made.dataset.schema.tasks))
    row_id_N, logit_NT = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row_id_N[row_id_N >= 0], logit_NT[row_id_N >= 0]


def state_numbers(model: nn.Module) -> int:
    """Numbers that the optimisers of a model's tables keep on this rank."""
    states = [state for kernel in table_kernels(model) for state in kernel.split_optimizer_states()]
    return sum(tensor.numel() for state in states for tensor in state)


def refusal(act: Any) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def failing(batches: Sequence[Batch]) -> Iterator[Batch]:
    """A batch, and then, on rank 1, an error."""
    yield batches[0]
    if dist.get_rank() == 1:
        raise UserError("part-7 cannot be read")
    yield batches[0]


def main(folder: Path) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lockstep.dist = NcclDefault()  # type: ignore[attr-defined]
    loading = {
        "fp32": Loading(shard=shard_for_scoring),
        "fp16": Loading(precision="fp16", shard=shard_for_scoring),
        "needed": Loading("needed", shard=shard_for_scoring),
    }
    training = 0
    if ranks == 2:
        learning = trainer(folder, TWO)
        write_checkpoint(learning)
        training = state_numbers(learning.learner.model)
    dist.barrier()
    for case in CASES:
        made = weights(folder, case, loading["fp32"])
        torch.save(scores(made), folder / f"{case}.fp32.{ranks}-{rank}.pt")
    run = Run(folder / TWO)
    record_step = checkpoint.steps(run.checkpoints)[-1]
    scorer = Scorer(run, made.dataset, "valid", BATCH, loading=loading["fp32"])
    record = scorer.evaluate(record_step, write_predictions=True)
    if rank == 0:
        rows = predictions.read(predictions.path(run, "valid", record["step"]))
        torch.save((record, rows.to_dict(as_series=False)), folder / f"record.{ranks}.pt")
    else:
        assert record == {}
    assert (Scorer(run, made.dataset, "valid", BATCH, loading=loading["needed"]).evaluate(record_step) == {}) == (
        rank > 0
    )
    for name in ("fp16", "needed"):
        torch.save(scores(weights(folder, TWO, loading[name])), folder / f"{TWO}.{name}.{ranks}-{rank}.pt")
    refused = [
        refusal(lambda: weights(folder, TWO, Loading(precision="bf16", shard=shard_for_scoring))),
        refusal(lambda: damaged(folder / TWO, loading["fp32"], folder)),
        refusal(lambda: list(batches_in_step(failing([Batch]), list))),
        refusal(lambda: changed(Scorer(run, made.dataset, "valid", BATCH, loading=loading["needed"]))),
    ]
    torch.save((refused, (state_numbers(made.ranker), training)), folder / f"refused.{ranks}-{rank}.pt")


def changed(scorer: Scorer) -> None:
    """Scores with the needed rows of a split of which rank 1 has another one since."""
    needed = scorer.weights.needed
    if dist.get_rank() == 1:
        needed.update({table: row_N[:1] for table, row_N in needed.items()})
    scorer.score(checkpoint.steps(scorer.run.checkpoints)[-1])


def damaged(run: Path, loading: Loading, folder: Path) -> None:
    """Loads a checkpoint of which one file, that one rank checks, has changed."""
    path = checkpoint.folder(run / "checkpoints", checkpoint.steps(run / "checkpoints")[-1])
    file = path / "rank-00001.bin"
    content = file.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dist.barrier()
    try:
        weights(folder, TWO, loading)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(content)
        dist.barrier()


if __name__ == "__main__":
    on_each_rank(main)
