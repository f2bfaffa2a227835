"""Two ranks of one evaluator: torchrun two_following_ranks.py RUN writes RUN/said-RANK.json, the steps that each rank yielded.

Then the checkpoint of step 4 is damaged and evaluated without following and with it: both ranks must end with the error.
"""

import json
import sys
from pathlib import Path

from pipeline.quick_imports import quick_imports

with quick_imports():
    import torch.distributed as dist

    from features.errors import UserError
    from pipeline.evaluation import ranks
    from pipeline.evaluation.follow import EvaluateConfig, Evaluation
    from pipeline.run.run import Run


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    run, rank = Run(path), dist.get_rank()
    settings = {"run": path, "threads": 1, "idle": False}
    evaluation = Evaluation(EvaluateConfig(follow=True, order="newest", **settings))
    steps = [record["step"] for record in evaluation.records()]
    dist.barrier()
    if rank == 0:
        run.eval_metrics.rename(path / "first.jsonl")
        file = path / "checkpoints" / "step-00000004" / "rank-00000.bin"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    errors = []
    for follow in (False, True):
        try:
            list(Evaluation(EvaluateConfig(follow=follow, **settings)).records())
        except UserError as caught:
            errors.append(str(caught))
    said = {"steps": steps, "errors": errors, "first": ranks.from_first(lambda: rank)}
    (path / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
