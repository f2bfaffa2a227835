"""The batch script of a workload on Slurm: its options, what it runs on each node, and what becomes of its exit code."""

import re
import shlex
from collections.abc import Iterable, Sequence

from pipeline.cluster.base import Workload

LAUNCHER = "jobs.launch"
# A line of a task in the log, as srun --label and torchrun's --tee name it.
LOG_LINE = re.compile(r" *(?P<node>[0-9]+): (?:rank (?P<rank>[0-9]+): )?(?P<text>.*)")

# What comes before a node's command. Slurm signals every process of a task: the shell outlives SIGTERM, to pass on the code.
_NODE_BEGIN = """
node() {
    local code ranks
    trap : TERM
    ranks=$(mktemp -d)
"""
# srun returns the highest code of all nodes. A failure outranks 75 so: one node's would be lost behind the preemption
# of others, and the job would be requeued for ever.
_NODE_END = """
    code=$?
    rm -rf "$ranks"
    if [ $code -lt 128 ]; then echo "exit code $code"; fi
    if [ $code -ge 1 ] && [ $code -le 24 ]; then code=$((code + 100)); fi
    exit $code
}
"""

_BEGIN = """
# jobs.submit reads it: running, succeeded, failed, stopped or requeued; the exit code; how often Slurm has requeued the job.
state() { echo "$1 $2 ${SLURM_RESTART_COUNT:-0}" >"$log.state.new" && mv "$log.state.new" "$log.state"; }
# A field of this job as Slurm has it now; nothing where its controller does not answer for a minute.
job() {
    local found _
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12; do
        if found=$(scontrol --oneliner show job "$id") || ! command -v scontrol >/dev/null; then break; fi
        sleep 5
    done
    grep -oE "(^| )$1=[^ ]*" <<<"$found" | head -n 1 | cut -d= -f2
}
is_running() { case $(job JobState) in "" | RUNNING) ;; *) false ;; esac }
preempted() { case $(job PreemptTime) in "" | None) false ;; esac }

# SIGTERM reaches this shell before the time limit, from jobs.submit stop, and where Slurm ends the job. It is passed on to the
# processes on the nodes, once. srun must not get it: it would kill them at once. Where Slurm ends or preempts the job, it
# has signalled them itself.
terminate() {
    local steps
    interrupted=1
    if [ -n "$terminated" ]; then return; fi
    terminated=1
    if [ -z "$srun" ] || ! is_running || preempted; then return; fi
    while kill -0 "$srun" 2>/dev/null; do
        sleep 1  # also for a step that has just begun, whose processes do not listen yet
        steps=$(squeue --noheader --steps --jobs="$id" --format=%i | grep -E '[.][0-9]+ *$')
        if [ -n "$steps" ]; then
            scancel --quiet --signal=TERM $steps
            return
        fi
    done
}
terminated= srun= code=75 ended=failed attempt=0
trap terminate TERM
trap 'code=$?; if [ "$ended" = failed ] && [ $code = 0 ]; then ended=succeeded; fi; state "$ended" "$code"' EXIT
state running -
"""

_RUN = """
run() {
    local found nodes begin
    code=75
    if [ -n "$terminated" ]; then return; fi
    nodes=$(job NumNodes)  # fewer than at first, where one was lost
    nodes=${nodes:-$SLURM_JOB_NUM_NODES}
    begin=$(wc -l <"$log.log")
    set -m  # a process group of its own: Slurm signals that of this shell
    SRUN "$(declare -f node); node \\"\\$@\\"" node "$@" </dev/null &
    srun=$!
    set +m
    if [ -n "$terminated" ]; then terminated= && terminate; fi  # it came before there was something to pass it on to
    interrupted=1
    while [ -n "$interrupted" ]; do
        interrupted=
        wait "$srun"
        found=$?
        if [ $found != 127 ]; then code=$found; fi
    done
    srun=
LOST    if [ "$code" -ge 101 ] && [ "$code" -le 124 ]; then code=$((code - 100)); fi
}
"""

# Nodes that were lost print no code, and the others have gone on without them: theirs count.
_WITHOUT_LOST = """\
    if [ "$code" -gt 128 ]; then
        found=$(tail -n "+$((begin + 1))" "$log.log" | sed -nE 's/^ *[0-9]+: exit code ([0-9]+)$/\\1/p' |
            awk '{ print ($1 >= 1 && $1 <= 24 ? $1 + 100 : $1) }' | sort -n | tail -n 1)
        code=${found:-$code}
    fi
"""

_END = """
while run "${element[@]}"; [ -z "$terminated" ] && [ $attempt -lt $retries ] && is_retried && ! preempted; do
    attempt=$((attempt + 1))
    echo "exit code $code: attempt $attempt of $retries to run it again"
    sleep 5
done

# A job that somebody ends is not run again: jobs.submit stop sets Requeue=0, scancel leaves no JobState=RUNNING.
if is_requeued || { [ $code != 0 ] && preempted; }; then
    if ! is_running || [ "$(job Requeue)" = 0 ]; then
        ended=stopped
        exit 143  # not 75, for which a site's RequeueExit may requeue it
    fi
    ended=requeued
    scontrol requeue "$id" || echo "Slurm refuses to requeue this job; its RequeueExit=75 in slurm.conf would, too"
elif [ $code != 0 ] && [ -n "$terminated" ] && { ! is_running || [ "$(job Requeue)" = 0 ]; }; then
    ended=stopped
fi
exit $code
"""


def batch_script(
    work: Workload,
    options: Iterable[str],
    words: Sequence[str],
    *,
    before: Iterable[str],
    environment: dict[str, str],
    log: str,
    cpus: int,
    ports: tuple[int, int],
) -> str:
    """The script that sbatch takes.

    Args:
        options: of sbatch, each without white space. words: of a node's command, from `node_command`, quoted.
        before: lines of shell that run first. log: path of its files, up to the job's id, without white space.
        ports: least and greatest of those that several nodes meet at.
    """
    codes = [str(code) for code in work.kind.final]
    # jobs.launch has restarted ranks that failed; what it cannot answer is that it is killed itself.
    retried = (
        "[ $code -gt 128 ]" if work.kind.launched else f"case $code in {'|'.join(['0', '75', *codes])}) false ;; esac"
    )
    requeued = f"case $code in {'|'.join(codes) or 'none'}) false ;; esac" if work.service else "[ $code = 75 ]"
    elastic = work.nodes.least < work.nodes.most
    srun = f'srun --label --nodes="$nodes" --ntasks="$nodes" --cpus-per-task={cpus} --kill-on-bad-exit=0'
    if elastic:
        srun += " --no-kill"
    parts = [
        "#!/bin/bash -l\n" + "".join(f"#SBATCH {option}\n" for option in options),
        "id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}\n"
        f"log={log}-$id\nretries={work.retries}\n"
        f"is_retried() {{ {retried}; }}\nis_requeued() {{ {requeued}; }}\n",
        _BEGIN.lstrip(),
        "export SLURM_EXPORT_ENV=ALL  # srun passes on what is set here; sbatch's NIL would keep it back\n"
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={max(work.grace_s - 10, 1)}\n"
        "export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='rank ${rank}: '\n"
        + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        + "".join(f"{line}\n" for line in before),
        _rendezvous(work, ports) + _elements(work.array),
        _NODE_BEGIN.strip() + "\n    " + " ".join(words) + ' "$@"' + _NODE_END.rstrip() + "\n",
        _RUN.lstrip().replace("SRUN", f"{srun} bash -c").replace("LOST", _WITHOUT_LOST if elastic else ""),
        _END.lstrip(),
    ]
    return "\n".join(parts)


def node_command(work: Workload, words: Sequence[str]) -> list[str]:
    """The words of one node, quoted for a shell; those of the rendezvous are looked up there.

    Args:
        words: of the command, as `command` gives them.
    """
    quoted = [shlex.quote(word) for word in words]
    if LAUNCHER not in words:
        return quoted
    module = words.index("-m", words.index(LAUNCHER))
    # As many as Slurm gave, so that none waits for more.
    nodes = f"{work.nodes.least}:" if work.nodes.least < work.nodes.most else ""
    flags = [word for word in quoted[:module] if not word.startswith("--nnodes=")]
    flags += [f'"--nnodes={nodes}$SLURM_STEP_NUM_NODES"', "--tee=3", '"--log-dir=$ranks"']
    if work.nodes.most > 1:
        # The node of the batch script has the store: if it is lost, Slurm ends the job, and requeues it.
        flags += ["--rdzv-backend=c10d", '"--rdzv-endpoint=$endpoint"', '"--rdzv-id=$rendezvous"']
        flags += ['"--rdzv-conf=is_host=$((SLURM_NODEID == 0))"']
    return flags + quoted[module:]


def _rendezvous(work: Workload, ports: tuple[int, int]) -> str:
    if work.nodes.most == 1:
        return ""
    least, greatest = ports
    return (
        "address=$(scontrol --oneliner show node \"$SLURMD_NODENAME\" | grep -oE ' NodeAddr=[^ ]*' | cut -d= -f2)\n"
        f"export endpoint=$address:$(({least} + SLURM_JOB_ID % {greatest - least + 1}))\n"
        "export rendezvous=$id.${SLURM_RESTART_COUNT:-0}\n"
    )


def _elements(array: Sequence[Sequence[str]]) -> str:
    """The words that this element of an array has beyond the others'."""
    cases = "".join(f"    {index}) element=({shlex.join(words)}) ;;\n" for index, words in enumerate(array))
    return "element=()\n" + (f"case $SLURM_ARRAY_TASK_ID in\n{cases}esac\n" if array else "")
