"""Runs disturbed at random moments, compared with undisturbed ones: python tests/benchmarks/chaos.py seeds=40 minutes=30.

Each seed is a run of 40 steps with a checkpoint every 4, with faults that the seed draws: on one machine tied to a step
and a phase of it (chaos_rank.py), over two hosts (tests/hosts.py: root, iproute2) to a step or to a time after the fault
before. What ends is started again, as a scheduler does. In the end the run has to be that of an undisturbed one:

- weights and optimisers, put together from the checkpoint's bytes: bit for bit where the number of ranks never changed, with
  dropout; else within 10 times what undisturbed runs on 1, 2, 3 and 4 ranks differ by, without dropout, whose draws depend on
  the number of ranks;
- the same rows in the same steps, each row once an epoch, in the history of the attempts that took each step last;
- the same lines of metrics, one a step (their numbers too, as above), the same checkpoints, status.json finished;
- no process or staging folder is left, no traceback was printed, and what failed has printed a line that begins with error.

Arguments: seeds, first (seed), minutes (no seed begins later), hosts (0: none; N: every Nth seed is over hosts).
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import chaos_hosts
from chaos_judge import DROPOUT, SETTINGS, STEPS, Outcome, command, judge, leftovers, script, unclean
from tabulate import tabulate
from tiny_training import make_dataset

ENDINGS = {"kill rank": 4, "kill all": 3, "TERM launcher": 3, "TERM rank": 1, "stop rank": 1}
PHASES = {
    "import": 1, "later": 2, "start": 1, "forward": 2, "step": 2, "writing": 4, "committed": 2, "pruning": 1, "end": 1,
}  # fmt: skip
DAMAGE = ("flip bit", "cut file", "remove manifest", "leave staging", "tear line")


def main() -> None:
    """Does the seeds, prints the table and writes results/chaos.json. Exits with 1, and keeps the runs, if one differs."""
    options = {"seeds": 40, "first": 0, "minutes": 30, "hosts": 3}
    options |= {key: int(value) for key, value in (word.split("=") for word in sys.argv[1:])}
    begin, outcomes = time.monotonic(), []
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    make_dataset(folder / "data")
    for seed in range(options["first"], options["first"] + options["seeds"]):
        if time.monotonic() - begin > 60 * options["minutes"]:
            break
        over_hosts = options["hosts"] and seed % options["hosts"] == options["hosts"] - 1
        outcomes.append((chaos_hosts.suffer if over_hosts else suffer)(folder, seed))
        print(json.dumps(row(outcomes[-1])), *outcomes[-1].wrong, sep="\n", file=sys.stderr, flush=True)
    print(tables(outcomes))
    content = {"options": options, "runs": [row(outcome) for outcome in outcomes]}
    (Path(__file__).parent / "results" / "chaos.json").write_text(json.dumps(content, indent=1) + "\n")
    if any(outcome.wrong for outcome in outcomes):
        sys.exit(f"error: not as undisturbed; the runs and logs are in {folder}")
    subprocess.run(["rm", "-r", str(folder)], check=True)


# Runs on one machine


def suffer(folder: Path, seed: int) -> Outcome:
    """A run on one machine, with the faults that a seed draws."""
    rng = random.Random(seed)
    counts = [1, 2, 3, 4] if rng.random() < 0.4 else [rng.choice([1, 2, 2, 2, 3, 4])]
    return disturbed(folder, f"run-{seed}", counts, draw(rng), rng)


def draw(rng: random.Random) -> list[dict[str, Any]]:
    """Faults in the order of their steps, as chaos_rank.py reads them; what comes at the end is last."""
    faults = []
    for step in sorted(rng.sample(range(STEPS - 3), rng.randint(6, 9))):
        phase, ending = (rng.choices(list(kinds), list(kinds.values()))[0] for kinds in (PHASES, ENDINGS))
        if ending == "stop rank" and phase in ("import", "later", "end"):
            phase = "forward"  # nothing is promised of a rank that does not beat yet, or no more
        acts = [act for act in DAMAGE if ending in ("kill rank", "kill all", "stop rank") and rng.random() < 0.2]
        if ending != "kill all":  # the file has one writer
            acts = [act for act in acts if act != "tear line"]
        step = 0 if phase in ("import", "later", "start") else step
        rank = 0 if phase in ("committed", "pruning") else rng.randrange(4)
        call = {"writing": 1 if rank else rng.randint(1, 5), "later": rng.randint(1, 20)}.get(phase, 0)
        faults.append({"phase": phase, "step": step, "rank": rank, "call": call, "acts": [*acts, ending]})
    return sorted(faults, key=lambda fault: fault["phase"] == "end")


def disturbed(folder: Path, name: str, counts: list[int], faults: list[dict[str, Any]], rng: random.Random) -> Outcome:
    """A run with faults, on one of these numbers of ranks after each command."""
    outcome, begin = Outcome(name), time.monotonic()
    (folder / f"{name}.faults.json").write_text(json.dumps(faults))
    settings = SETTINGS | {"dropout": DROPOUT if len(counts) == 1 else 0}
    code = -1
    while code and outcome.commands < len(faults) + 3:
        flags = [f"--nproc-per-node={rng.choice(counts)}", f"--max-restarts={rng.choice([0, 2])}"]
        code, log = command(folder, name, [*flags, *script(folder, name, 100 * outcome.commands, settings)])
        outcome.commands += 1
        outcome.log += f"--- {flags}: {code}\n{log}"
        outcome.wrong += unclean(code, log)
        outcome.wrong += [f"command {outcome.commands} has left {left}" for left in leftovers(str(folder / name))]
    (folder / f"{name}.log").write_text(outcome.log)
    if code:
        outcome.wrong.append(f"exit code {code} of the last of {outcome.commands} commands")
    for fault in faults[: len(list((folder / f"{name}.injected").glob("*")))]:
        outcome.faults.update([*fault["acts"], f"in {fault['phase']}"])
    judge(folder, outcome, counts)
    outcome.seconds = time.monotonic() - begin
    return outcome


def row(outcome: Outcome) -> dict[str, Any]:
    """Of the table, and of results/chaos.json."""
    kinds = {kind: count for kind, count in sorted(outcome.faults.items()) if count}
    return {
        "run": outcome.name, "faults": kinds, "commands": outcome.commands, "starts": outcome.starts,
        "again": outcome.again, "deviation": outcome.deviation, "seconds": round(outcome.seconds), "wrong": outcome.wrong,
    }  # fmt: skip


def tables(outcomes: list[Outcome]) -> str:
    """The runs, and the sums of their faults."""
    lines = [
        [o.name, ", ".join(f"{c} {k}" for k, c in sorted(o.faults.items()) if c and not k.startswith("in ")), o.commands,
         o.starts, o.again, "; ".join(o.wrong) or (f"within {o.deviation:.2f}" if o.deviation else "bit for bit")]
        for o in outcomes
    ]  # fmt: skip
    sums = sorted(sum((o.faults for o in outcomes), Counter()).items())
    headers = ["run", "faults", "commands", "starts", "steps taken again", "equal"]
    total = sum(count for kind, count in sums if not kind.startswith("in "))
    return "\n\n".join(
        [
            tabulate(lines, headers, tablefmt="github"),
            tabulate(sums, ["fault", "times"], tablefmt="github"),
            f"{total} faults",
        ]
    )


if __name__ == "__main__":
    main()
