"""The batch script of a workload, whose pieces a real bash runs, and the log that it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import jobs
from features.errors import UserError
from pipeline.cluster.base import Workload
from pipeline.cluster.slurm import Slurm
from pipeline.cluster.values import mebibytes, whole_cpus

# Each of them ends the word, the line or the script where it is not quoted.
HOSTILE = [
    "it's",
    'a "b" c',
    "$HOME ${PATH} $(id) `id`",
    "a\n#SBATCH --uid=0\nexit 1",
    "\\",
    "*",
    "; exit 9",
    "é ☃",
    "\tx ",
    "}",
]
PRINTS = (sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))")


def slurm(**settings: Any) -> Slurm:
    return Slurm.model_validate({"backend": "slurm", "folder": "/shared", "python": "python"} | settings)


def workload(job: str = "train", *words: str, **changes: Any) -> Workload:
    given: dict[str, Any] = {"name": "run-1", "nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "cpu": "2500m"}
    given |= {"memory": "3Gi", "time_limit_s": 3601, "grace_s": 300, "retries": 3}
    return Workload(job=job, words=list(words), **given | changes)


def options(script: str) -> dict[str, str]:
    """sbatch's, as it reads them: up to the first line that is no comment."""
    head = script.splitlines()[: script.splitlines().index("")]
    assert head[0] == "#!/bin/bash -l"
    pairs = (line.removeprefix("#SBATCH --").partition("=") for line in head[1:])
    return {name: value for name, _, value in pairs}


def node_words(script: str, *words: str, **variables: str) -> list[str]:
    """What the command of a node gets, when bash runs the function `node` of the script."""
    begin = script.index("\nnode() {")
    function = script[begin : script.index("\n}\n\nrun() {") + 3]
    environment = {"PATH": os.environ["PATH"], "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0", **variables}
    command = ["bash", "-c", f'{function}node "$@"', "bash", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *printed, code = done.stdout.splitlines()
    assert code == "exit code 0"
    return json.loads("".join(printed))


def accepted_by_bash(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_settings_and_resources_become_options_of_sbatch() -> None:
    cluster = slurm(
        partition="gpu,spot", account="ads", qos="low", constraint="a100&ib", reservation="x", exclusive=True
    )
    found = options(
        cluster.render(workload(nodes="2..8", gpus_per_node=4, ranks_per_node=4, after=["7", "9"], suspend=True))
    )
    assert found == {
        "job-name": "run-1", "chdir": "/shared", "output": "/shared/runs/slurm/run-1-%j.log", "open-mode": "append",
        "nodes": "2-8", "cpus-per-task": "3", "mem": "3072M", "time": "61", "signal": "B:TERM@300", "export": "NIL",
        "propagate": "NONE",
        "partition": "gpu,spot", "account": "ads", "qos": "low", "constraint": "a100&ib", "reservation": "x",
        "dependency": "afterok:7:9", "kill-on-invalid-dep": "yes", "requeue": "", "gpus-per-node": "4",
        "exclusive": "", "no-kill": "", "hold": "",
    }  # fmt: skip
    found = options(
        slurm(gres="gpu:h100", log_folder="/logs").render(workload(nodes=2, gpus_per_node=1, array=[["a=1"]] * 3))
    )
    assert found["gres"] == "gpu:h100:1"
    assert found["array"] == "0-2"
    assert found["output"] == "/logs/run-1-%A_%a.log"
    assert found["nodes"] == "2"
    assert not {"no-kill", "gpus-per-node", "partition", "hold", "exclusive", "dependency"} & found.keys()


def test_a_node_gets_each_word_as_it_was_given() -> None:
    words = [f"key={text}" for text in HOSTILE]
    of_one_line = [text for text in HOSTILE if text.isprintable()]
    script = slurm(container=[*PRINTS, *of_one_line]).render(workload("preprocess", *words))
    assert accepted_by_bash(script)
    assert node_words(script) == [*of_one_line, "python", "-m", "jobs.preprocess", *words]


def test_an_element_of_an_array_gets_its_own_words() -> None:
    array = [[f"a={text}", f"b={text}"] for text in HOSTILE]
    script = slurm().render(workload("preprocess", array=array))
    assert accepted_by_bash(script)
    begin = script.index("element=()")
    choose = script[begin : script.index("esac", begin) + 4]
    for index, words in enumerate(array):
        done = subprocess.run(
            ["bash", "-c", f"SLURM_ARRAY_TASK_ID={index}\n{choose}\nprintf '%s\\0' \"${{element[@]}}\""],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split("\0")[:-1] == words


def test_nodes_meet_at_the_first_one_by_as_many_as_slurm_gave() -> None:
    script = slurm(container=PRINTS).render(workload(nodes="2..8", ranks_per_node=4))
    assert accepted_by_bash(script)
    meet = {"endpoint": "10.0.0.1:20007", "rendezvous": "7.1"}
    for node, host in (("0", "1"), ("5", "0")):
        found = node_words(script, SLURM_NODEID=node, SLURM_STEP_NUM_NODES="6", **meet)
        [logs] = (word for word in found if word.startswith("--log-dir="))
        assert not Path(logs.partition("=")[2]).exists()  # it is removed at the end
        assert [word for word in found if word != logs] == [
            "python", "-m", "jobs.launch", "--nproc-per-node=4", "--max-restarts=3", "--nnodes=2:6", "--tee=3",
            "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:20007", "--rdzv-id=7.1", f"--rdzv-conf=is_host={host}",
            "-m", "jobs.train",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("printed", "code"),
    [("1: exit code 0", "0"), (" 0: exit code 0\n10: exit code 75", "75"), ("0: exit code 75\n1: exit code 1", "101"),
     ("0: rank 0: exit code 0", "137"), ("", "137")],
)  # fmt: skip
def test_a_node_that_was_killed_counts_by_the_others_where_they_may_go_on(
    tmp_path: Path, printed: str, code: str
) -> None:
    script = slurm().render(workload(nodes="1..11"))
    begin = script.index('    if [ "$code" -gt 128 ]; then')
    piece = script[begin : script.index("    fi\n", begin) + 7]
    (tmp_path / "x.log").write_text(f"0: exit code 9\n{printed}\n")  # the first line is of an earlier attempt
    command = ["bash", "-c", f"code=137 begin=1 log={tmp_path}/x\n{piece}\necho $code"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == code
    assert piece not in slurm().render(workload(nodes=11))


def test_variables_are_exported_as_they_were_given_after_those_of_the_script_itself() -> None:
    values = {f"V{index}": text.replace("\n", " ").replace("\t", " ") for index, text in enumerate(HOSTILE)}
    script = slurm(environment=values | {"SLURM_EXPORT_ENV": "X"}, before=["V0=changed"]).render(workload())
    begin = script.index("export SLURM_EXPORT_ENV")
    exports = script[begin : script.index("\n\n", begin)]
    done = subprocess.run(
        ["bash", "-c", f"{exports}\nenv -0"], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True
    )
    found = dict(line.split("=", 1) for line in done.stdout.decode().split("\0")[:-1])
    assert values | {"V0": "changed", "SLURM_EXPORT_ENV": "X"} == {
        n: v for n, v in found.items() if n in values or n == "SLURM_EXPORT_ENV"
    }


@pytest.mark.parametrize(
    ("job", "changes"),
    [("train", {}), ("train", {"nodes": 2}), ("train", {"service": True}), ("evaluate", {"service": True}),
     ("evaluate", {"ranks_per_node": 2}), ("nightly", {})],
)  # fmt: skip
def test_bash_accepts_the_script_of(job: str, changes: dict[str, Any]) -> None:
    assert accepted_by_bash(slurm(before=["module load cuda"]).render(workload(job, **changes)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("partition", "a b"), ("partition", "a\n#SBATCH --uid=0"), ("account", "--uid=0"), ("qos", ""), ("reservation", "a;b"),
     ("constraint", "a b"), ("constraint", '"'), ("gres", "gpu:2:3 x"), ("gres", "gpu\n"), ("before", ["a\nb"]),
     ("before", [""]),
     ("python", "a\nb"), ("container", [""]), ("container", ["\x1b"]), ("folder", "/a b"), ("folder", "/a%j"),
     ("folder", "/a\n"),
     ("log_folder", "/a'b"), ("ports", [2000, 1999]), ("ports", [80, 90]), ("ports", [60000, 70000]),
     ("environment", {"A": "a\nb"}), ("environment", {"A=B": "c"}), ("mystery", 1)],
)  # fmt: skip
def test_a_setting_that_would_be_read_as_something_else_is_refused(setting: str, value: object) -> None:
    with pytest.raises(ValidationError, match=setting):
        slurm(**{setting: value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"schedule": "0 3 * * *"}, r"schedule=0 3 \* \* \*: cluster=slurm starts jobs once\. Have cron"),
     ({"time_limit_s": 360}, r"time_limit_s=360: .* Raise time_limit_s above 360"),
     ({"after": ["train-x"]}, r"after: 'train-x' is not the number of a job")],
)  # fmt: skip
def test_what_slurm_cannot_do_is_refused_before_anything_is_queued(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        slurm().submit(workload(**changes))


def test_a_working_directory_that_sbatch_would_misread_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "with space").mkdir()
    monkeypatch.chdir(tmp_path / "with space")
    with pytest.raises(
        UserError, match=r"the working directory '.*with space' is not a path of letters.*: set cluster\.folder"
    ):
        slurm(folder=None).render(workload())


def test_a_machine_without_slurm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^sbatch is not installed here: run this on a login node"):
        slurm(folder=str(tmp_path)).submit(workload())


def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Commands of Slurm that are these lines of shell; each appends what it is told to `asked`."""
    for name, lines in scripts.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{folder}/asked\n{lines}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("printed", ["4711", "4711;cluster", "Welcome\n4711\nSee 12 for more"])
def test_the_number_of_a_job_is_found_in_what_sbatch_prints(
    printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path, monkeypatch, sbatch=f"cat <<'.'\n{printed}\n.")
    assert slurm(folder=str(tmp_path)).submit(workload()) == "4711"


def test_what_a_command_prints_beside_its_answer_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = slurm(folder=str(tmp_path))
    stand_ins(tmp_path, monkeypatch, sbatch="echo no", squeue="echo hello; echo '7|RUNNING|None|n1'")
    with pytest.raises(UserError, match=r"sbatch printed no number of a job but 'no.*squeue --me shows"):
        cluster.submit(workload())
    assert cluster.status(workload(), "7") == ("running", "RUNNING on n1", 0)
    stand_ins(tmp_path, monkeypatch, sbatch="exec sleep 9")
    monkeypatch.setattr("pipeline.cluster.slurm.TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match=r"no answer from Slurm within 0\.2 s: squeue --me shows"):
        cluster.submit(workload())
    monkeypatch.setattr("pipeline.cluster.slurm.TIMEOUT_S", 60)
    stand_ins(tmp_path, monkeypatch, squeue="printf 'hello \\xff'")
    with pytest.raises(UserError, match="squeue: not what was asked for: 'hello"):
        cluster.status(workload(), "7")


def test_a_log_is_followed_while_squeue_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.slurm.POLL_S", 0.01)
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    (tmp_path / "runs" / "slurm" / "run-1-7.log").write_text(" 0: begin\n")
    down = f"[ $(wc -l <{tmp_path}/asked) -gt 3 ] || exit 1; echo '7|COMPLETED|None|n1'"
    stand_ins(tmp_path, monkeypatch, squeue=down)
    assert list(slurm(folder=str(tmp_path)).logs(workload(), "7", None, follow=True)) == ["node 0: begin"]
    stand_ins(tmp_path, monkeypatch, squeue="exit 1")
    with pytest.raises(UserError, match="squeue: exit code 1"):
        list(slurm(folder=str(tmp_path)).logs(workload(), "7", None, follow=True))


def test_a_job_whose_script_does_not_listen_yet_gets_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.slurm.POLL_S", 0.01)
    stand_ins(tmp_path, monkeypatch, squeue="echo '7|RUNNING|None|n1'", scancel="", scontrol="")
    cluster, state = slurm(folder=str(tmp_path)), tmp_path / "runs" / "slurm" / "run-1-7.state"
    state.parent.mkdir(parents=True)
    for content, told in (("requeued 75 0", 0), ("running - 1", 1)):
        (tmp_path / "asked").unlink(missing_ok=True)
        state.write_text(content)
        cluster.stop(workload(grace_s=1), "7")
        asked = (tmp_path / "asked").read_text()
        assert asked.count("--signal=TERM 7") == told
        assert asked.splitlines()[-1] == "scancel --quiet 7"


def test_a_script_whose_controller_restarts_asks_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "[ $(wc -l <{0}/asked) -gt {1} ] || exit 1; echo 'JobId=7 JobState=RUNNING Requeue=1'"
    script = slurm().render(workload())
    functions = script[script.index("job() {") : script.index("preempted() {")]
    ask = f"id=7\nsleep() {{ :; }}\n{functions}\njob JobState; is_running && echo yes"
    for silent, said in ((3, "RUNNING\nyes\n"), (99, "yes\n")):  # what is not known does not end a job
        (tmp_path / "asked").unlink(missing_ok=True)
        stand_ins(tmp_path, monkeypatch, scontrol=answer.format(tmp_path, silent))
        assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout == said
    (tmp_path / "scontrol").unlink()
    nowhere = f"id=7\nPATH={tmp_path}; sleep() {{ echo slept; }}\n{functions}\nis_running && echo yes"
    assert subprocess.run(["/bin/bash", "-c", nowhere], capture_output=True, text=True, check=True).stdout == "yes\n"


def test_a_record_finds_its_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pinned = {"backend": "slurm"} | slurm(folder=None).pinned()
    monkeypatch.chdir("/")
    assert Slurm.model_validate(pinned).of_job(Path("run")) == tmp_path / "run"


def test_each_line_of_a_log_names_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "slurm"
    folder.mkdir(parents=True)
    written = (
        " 0: warning\n10: rank 21: step 1\n 0: rank 1: \x1b[2Jred\nslurmstepd: error: *** JOB 7\n 0: rank 1: unfinished"
    )
    (folder / "run-1-7.log").write_text(written)
    cluster, work = slurm(folder=str(tmp_path)), workload(nodes=11, ranks_per_node=2)
    assert list(cluster.logs(work, "7", None, follow=False)) == [
        "node 0: warning", "rank 21: step 1", "rank 1: \\x1b[2Jred", "batch: slurmstepd: error: *** JOB 7",
        "rank 1: unfinished",
    ]  # fmt: skip
    assert list(cluster.logs(work, "7", 1, follow=False)) == ["rank 1: \\x1b[2Jred", "rank 1: unfinished"]
    (folder / "run-1-7_1.log").write_text("0: done\n")
    assert list(cluster.logs(workload("explain", array=[["a=1"], ["a=2"]]), "7", 0, follow=False)) == ["1/rank 0: done"]


def test_the_shipped_file_has_every_setting_with_its_default() -> None:
    content = yaml.safe_load((Path(jobs.__file__).parent / "conf" / "cluster" / "slurm.yaml").read_text())
    assert Slurm.model_validate(content) == Slurm(backend="slurm")
    assert content.keys() == Slurm.model_fields.keys()


def test_quantities_are_rounded_up() -> None:
    assert [whole_cpus(cpu) for cpu in ("1", "500m", "2001m", "2.5", "16000m")] == [1, 1, 3, 3, 16]
    found = [mebibytes(memory) for memory in ("1", "1048576", "1048577", "16Gi", "1.5Mi", "1G", "2000k", "1Pi")]
    assert found == [1, 1, 2, 16384, 2, 954, 2, 2**30]
