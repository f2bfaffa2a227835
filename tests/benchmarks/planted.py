"""Does the architecture search find what was put into generated data? python tests/benchmarks/planted.py [--seeds=5] [CASE...]

Each case draws a log a seed (planted_logs.py), searches in this process with the settings below and those of each variant, and
measures, as means over the seeds:

  groups    four tasks in two groups that share no features. agreement: the tasks are put into two clusters by their softmax of
            beta, those that overlap most first (average linkage); the share of the six pairs of tasks that are together, or
            apart, as in the groups; two pairs by chance have 5/9. exact: share of searches with exactly the groups
  product   a label that only <v_u, v_w> of two ids explains. product: share of searches whose interaction multiplies features
            (product, cross, attention: queries by keys). regret: NE of what won less that of the best, each alone, without
            experts or hidden layers after it
  linear    logits that are sums over features. skip, gating: shares of the used blocks. no interaction: of searches that found
            that. regret: NE of the used blocks, each alone after no interaction, mean, less that of the best
  noise     two learnable tasks beside fair coins of five times their weight. Difference of their NE, architecture found with
            the coins less the one found without: `together`, the first trained with the coins, the second without; `choice`,
            both without, which leaves what the search chose. Mean and its 95% interval over seeds (Student's t)

NE of trained models is that of the test split, which neither weights nor alpha have seen; 1 is the base rate. decided: the
share of the search after which the interaction is the one that was found. cpu: seconds of one search. Keeps
results/planted.json and results/planted.md unless --trial. Seeds begin at 100: settings were tried on lower ones.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARS_MAX_THREADS", "1")
sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import planted_logs
import yaml
from planted_logs import NOISE, Log
from recipe_run import composed
from scipy.stats import t as student
from tabulate import tabulate
from train_runs import RESULTS, machine

from features.errors import UserError
from jobs.entry import bound_resolvers, configure_logging, parse
from jobs.search import checked
from models.automtl.architecture import Architecture
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.scorer import Scorer
from pipeline.overrides import setting
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.search import record
from pipeline.search.search import search
from pipeline.training.config import TrainConfig
from pipeline.training.train import train

ROWS, FIRST_SEED = 30_000, 100
INTERACTIONS = ("product_inner", "product_outer", "cross_1", "attention_2", "mlp_8", "skip")
BLOCKS = ("gating", "mlp_16", "mlp_64", "conv_3", "skip")
MULTIPLY = {"product_inner", "product_outer", "cross_1", "attention_2"}
# Of training, whether of a supernet or of what was found.
TRAIN = (
    "model.embedding_std=0.3", "model.tower=[]", "train.threads=1", "train.batch_size=512", "train.epochs=10",
    "train.dense.name=adam", "train.dense.lr=0.01", "train.dense.decay=none", "train.log_every=1000",
    "train.checkpoint_every=1000000000", "train.checkpoint_async=false",
)  # fmt: skip
SEARCH = (
    "space.width=16", "space.token_dim=4", "space.experts=4", "space.depth=1", "space.chosen=2",
    f"space.interaction=[{','.join(INTERACTIONS)}]", f"space.blocks=[{','.join(BLOCKS)}]",
    "search.alpha_lr=0.02", "search.beta_lr=0.02", "search.patience=null",
)  # fmt: skip

Figures = dict[str, Any]


def searched(dataset: Path, folder: Path, seed: int, overrides: Sequence[str]) -> tuple[Architecture, Figures]:
    """An architecture, and how the search came to it; the run is removed."""
    own = [setting("dataset", dataset), setting("run", folder), f"train.seed={seed}"]
    begin = time.process_time()
    found = search(checked(composed("search", [*TRAIN, *SEARCH, *overrides, *own])))
    cpu = round(time.process_time() - begin, 1)
    lines = record.read(Run(folder))
    last = lines[-1]
    # The share of the search after which the interaction stays the same.
    decided = next(
        i for i in range(len(lines)) if all(x.architecture.interaction == found.interaction for x in lines[i:])
    )
    shutil.rmtree(folder)
    return found, {
        "found": found.summary(), "cpu": cpu, "alpha_entropy": last.alpha_entropy, "beta_entropy": last.beta_entropy,
        "decided": lines[decided].step / last.step, "interaction": last.interaction, "experts": last.experts,
        "tasks": last.tasks,
    }  # fmt: skip


def trained(
    dataset: Path, folder: Path, seed: int, found: Architecture, tasks: Sequence[str] | None = None
) -> dict[str, float]:
    """NE on the test split of an architecture trained from scratch, by task."""
    folder.mkdir()
    (folder / "architecture.yaml").write_text(yaml.safe_dump(found.model_dump()))
    own = [setting("dataset", dataset), setting("run", folder / "run"), f"train.seed={seed}", "model=automtl"]
    own.append(setting("model.architecture", folder))
    if tasks is not None:
        own.append(f"tasks=[{','.join(tasks)}]")
    config = parse(composed("train", [*TRAIN, *own]), TrainConfig)
    run = train(config)
    metrics, _ = Scorer(run, Dataset(dataset), "test", 8192).metrics(checkpoint.steps(run.checkpoints)[-1])
    ne = {task: float(figures["ne"]) for task, figures in metrics.compute().items()}
    shutil.rmtree(folder)
    return ne


def by_hand(interaction: str, block: str, tasks: Sequence[str]) -> Architecture:
    """One expert of one block for all tasks."""
    return Architecture(
        width=16, token_dim=4, interaction=interaction, experts=[[block]], tasks={task: [1] for task in tasks}
    )


def used_blocks(found: Architecture) -> Counter[str]:
    """Blocks of the experts that some task has."""
    return Counter(chain(*(found.experts[number - 1] for number in found.used)))


def groups(log: Log, dataset: Path, folder: Path, seed: int, overrides: Sequence[str]) -> Figures:
    _, figures = searched(dataset, folder, seed, overrides)
    strength = dict(zip(log.label, figures["tasks"], strict=True))
    agreed = planted_logs.agreement(strength, log.groups)
    return figures | {"agreement": agreed, "exact": float(agreed == 1)}


def product(log: Log, dataset: Path, folder: Path, seed: int, overrides: Sequence[str]) -> Figures:
    found, figures = searched(dataset, folder, seed, overrides)
    won = {"product": float(found.interaction in MULTIPLY), "winner": found.interaction}
    return figures | won | {"weighed": {found.interaction: 1.0}}


def linear(log: Log, dataset: Path, folder: Path, seed: int, overrides: Sequence[str]) -> Figures:
    found, figures = searched(dataset, folder, seed, overrides)
    blocks = used_blocks(found)
    shares = {name: blocks[name] / blocks.total() for name in BLOCKS}
    won = {"no interaction": float(found.interaction == "skip"), "winner": found.interaction}
    return figures | won | {"skip": shares["skip"], "gating": shares["gating"], "weighed": shares}


def noise(log: Log, dataset: Path, folder: Path, seed: int, overrides: Sequence[str]) -> Figures:
    learnable = [task for task in log.label if task != NOISE]
    beside, figures = searched(dataset, folder, seed, overrides)
    alone, without = searched(dataset, folder, seed, [*overrides, f"tasks=[{','.join(learnable)}]"])
    ne = {
        "beside, with": trained(dataset, folder, seed, beside),
        "beside, without": trained(dataset, folder, seed, beside, learnable),
        "alone, without": trained(dataset, folder, seed, alone, learnable),
    }
    means = {name: float(np.mean([by_task[task] for task in learnable])) for name, by_task in ne.items()}
    return figures | {
        "found alone": without["found"], "ne": ne, "together": means["beside, with"] - means["alone, without"],
        "choice": means["beside, without"] - means["alone, without"],
    }  # fmt: skip


def interactions_alone(log: Log, dataset: Path, folder: Path, seed: int) -> dict[str, float]:
    """NE of each interaction with nothing after it but a linear tower: what is best."""
    return {name: trained(dataset, folder, seed, by_hand(name, "skip", [*log.label]))["click"] for name in INTERACTIONS}


def blocks_alone(log: Log, dataset: Path, folder: Path, seed: int) -> dict[str, float]:
    """NE, mean of the tasks, of each block after no interaction."""
    return {
        name: float(np.mean([*trained(dataset, folder, seed, by_hand("skip", name, [*log.label])).values()]))
        for name in BLOCKS
    }


Judge = Callable[[Log, Path, Path, int, Sequence[str]], Figures]
EVEN, FULL, STRICT, SKIPS = "search.diversity=0", "search.diversity=1", "search.auxiliary=0", "space.blocks=[skip]"
NO_MLP = "space.interaction=[product_inner,product_outer,cross_1,attention_2,skip]"


class Case:
    """What is drawn, how a search of it is judged, and what else is measured once a seed.

    Args:
        variants: settings of searches by name; the first are those that work best.
        columns: figures of the table.
    """

    def __init__(
        self, draw: Callable[[int, int], Log], judge: Judge, variants: Mapping[str, Sequence[str]],
        columns: Sequence[str], truth: Callable[[Log, Path, Path, int], dict[str, float]] | None = None,
    ) -> None:  # fmt: skip
        self.draw, self.judge, self.variants, self.columns, self.truth = draw, judge, variants, columns, truth


CASES = {
    "groups": Case(
        planted_logs.groups, groups,
        {
            "diversity 0": (EVEN,), "diversity 0.01": ("search.diversity=0.01",), "diversity 1": (FULL,),
            "diversity 0, no auxiliary skip": (EVEN, STRICT),
        },
        ("agreement", "exact"),
    ),
    "product": Case(
        planted_logs.product_only, product,
        {
            "experts skip": (SKIPS,), "experts skip, no MLP": (SKIPS, NO_MLP), "all blocks": (),
            "experts skip, no auxiliary skip": (SKIPS, STRICT), "experts skip, one path": (SKIPS, STRICT, "search.paths=one"),
            "experts skip, order 2": (SKIPS, STRICT, "search.order=2"),
        },
        ("product", "regret"), interactions_alone,
    ),
    "linear": Case(
        planted_logs.linear_only, linear, {"diversity 0": (EVEN,), "diversity 0, no auxiliary skip": (EVEN, STRICT)},
        ("skip", "gating", "no interaction", "regret"), blocks_alone,
    ),
    "noise": Case(planted_logs.noise, noise, {"diversity 0": (EVEN,), "diversity 1": (FULL,)}, ("together", "choice")),
}  # fmt: skip


def measured(name: str, seeds: Sequence[int], folder: Path, only: Sequence[str] = ()) -> Figures:
    """All searches of a case."""
    case = CASES[name]
    runs: dict[str, list[Figures]] = {variant: [] for variant in case.variants if variant in (only or case.variants)}
    truths, attainable = [], []
    for seed in seeds:
        log = case.draw(seed, ROWS)
        dataset = planted_logs.write(log, folder / f"{name}-{seed}")
        attainable.append(planted_logs.attainable(log))
        if case.truth:
            truths.append(case.truth(log, dataset, folder / "run", seed))
        for variant, figures in runs.items():
            figures.append(case.judge(log, dataset, folder / "run", seed, case.variants[variant]))
            if case.truth:
                ne = sum(share * truths[-1][key] for key, share in figures[-1]["weighed"].items())
                figures[-1]["regret"] = ne - min(truths[-1].values())
            print(f"{name} {seed} {variant}: {figures[-1]['found']}", file=sys.stderr, flush=True)
        shutil.rmtree(dataset)
    return {"runs": runs, "alone": truths, "attainable": attainable}


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95% interval."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def tables(found: Mapping[str, Figures]) -> str:
    """Markdown: a line for each case and variant, then what each candidate does alone."""
    lines = []
    for name, content in found.items():
        for variant, runs in content["runs"].items():
            figures = []
            for column in CASES[name].columns:
                mean, half = mean_and_half([run[column] for run in runs])
                figures.append(f"{column} {mean:+.4f} ± {half:.4f}" if name == "noise" else f"{column} {mean:.3f}")
            chosen = Counter(run["winner"] for run in runs if "winner" in run)
            won = ", ".join(f"{winner} {count}" for winner, count in chosen.most_common())
            means = [np.mean([run[key] for run in runs]) for key in ("alpha_entropy", "beta_entropy", "decided", "cpu")]
            lines.append([name, variant, "; ".join(figures), won, *(f"{x:.2f}" for x in means[:3]), f"{means[3]:.0f}"])
    headers = ["case", "search", "found", "interaction", "entropy alpha", "beta", "decided", "cpu (s)"]
    parts = [tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)]
    for name, content in found.items():
        if content["alone"]:
            best = np.mean([np.mean([*known.values()]) for known in content["attainable"]])
            row = [f"{np.mean([alone[key] for alone in content['alone']]):.4f}" for key in content["alone"][0]]
            parts.append(
                f"NE of {name}, each candidate alone; attainable {best:.4f}:\n\n"
                + tabulate([row], [*content["alone"][0]], tablefmt="pipe", disable_numparse=True)
            )
    return "\n\n".join(parts)


def main() -> None:
    """Measures the cases, prints tables, keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; all without one")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variant", action="append", default=[], help="this one alone; others stay as they were")
    parser.add_argument("--trial", action="store_true", help="is not kept")
    options = parser.parse_args()
    if unknown := {*options.cases} - {*CASES}:
        raise UserError(f"{', '.join(sorted(unknown))}: not one of {', '.join(CASES)}")
    bound_resolvers()
    configure_logging("warning")
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    kept = RESULTS / "planted.json"
    found: dict[str, Any] = json.loads(kept.read_text())["cases"] if kept.exists() and not options.trial else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases or CASES:
            before = found.get(name, {}).get("runs", {}) if options.variant else {}
            found[name] = measured(name, seeds, Path(folder), options.variant)
            found[name]["runs"] = before | found[name]["runs"]
    found = {name: found[name] for name in CASES if name in found}
    text = tables(found)
    print(text)
    if not options.trial:
        settings = {"train": TRAIN, "search": SEARCH, "rows": ROWS, "first_seed": FIRST_SEED}
        settings["variants"] = {name: case.variants for name, case in CASES.items()}
        content = {"machine": machine(), "settings": settings, "cases": found}
        kept.write_text(json.dumps(content, separators=(",", ":")) + "\n")
        where = ", ".join(f"{key} {value}" for key, value in machine().items())
        (RESULTS / "planted.md").write_text(f"{text}\n\n{where}; settings in planted.json and planted.py.\n")


if __name__ == "__main__":
    main()
