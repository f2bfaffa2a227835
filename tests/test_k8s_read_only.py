"""k8s/: the jobs of the base run, one after the other, with what of a file system their pods can write and no more."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from k8s_manifests import ROOT, documents, main_of, pod_of

from pipeline.cluster.kubernetes.kustomize import DEMO

UNSHARE = ["unshare", "--mount", "--map-root-user"]
# Mounts of a pod in a mount namespace of its own: /data and /runs, which this machine lacks, below /mnt; all else read-only.
SCRIPT = """
set -e
mount -t tmpfs pod /mnt
mkdir /mnt/data /mnt/runs /mnt/checkout
mount --bind "$3" /mnt/checkout
mount --bind "$1/data" /mnt/data
mount --bind "$1/runs" /mnt/runs
mount -t tmpfs pod /tmp
case "$3" in /tmp/*) mkdir -p "$3"; mount --bind /mnt/checkout "$3" ;; esac
umount /mnt/checkout
mount -t tmpfs pod /dev/shm
[ "$2" = "-" ] || for path in $2; do mount -o remount,bind,ro "/mnt$path"; done
while read -r _ at _; do
    case "$at" in
        /mnt/*|/tmp|/dev|/dev/*|/proc|/proc/*|/sys|/sys/*) ;;
        *) mount -o remount,bind,ro "$at" 2>/dev/null || true ;;
    esac
done < /proc/self/mounts
if touch "$3/.written" 2>/dev/null; then rm "$3/.written"; echo "$3 can be written" >&2; exit 99; fi
shift 3
cd /
exec "$@"
"""


def possible() -> bool:
    if not shutil.which("unshare") or ROOT.is_relative_to("/mnt"):
        return False
    return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "pod", "/mnt"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not possible(), reason="needs a mount namespace, and a checkout outside of /mnt"),
]


def run_pod(folder: Path, job: str, args: list[str]) -> subprocess.CompletedProcess[str]:
    """A pod's command with its environment, and its volumes in folder/data and folder/runs."""
    found: dict[str, Any] = documents(job=job, words=args)
    (container,) = pod_of(main_of(found))["containers"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/runs", "/tmp", "/dev/shm"}
    read_only = [mount["mountPath"] for mount in container["volumeMounts"] if mount.get("readOnly")]
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    environment |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    known = {"$(JOB_COMPLETION_INDEX)": "0", "$(JOB_NAME)-0.$(JOB_NAME)": "127.0.0.1", "$$": "$"}
    line = "\n".join(container["command"][1:] + container["args"])
    for before, after in {**known, "=/data": "=/mnt/data", "=/runs": "=/mnt/runs"}.items():
        line = line.replace(before, after)
    command = [*UNSHARE, "sh", "-c", SCRIPT, "sh", str(folder), " ".join(read_only) or "-", str(ROOT)]
    return subprocess.run(
        [*command, sys.executable, *line.split("\n")], env=environment, capture_output=True, text=True, timeout=250
    )


def test_the_jobs_of_the_base_need_no_other_folder_than_their_pods_can_write(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    generate = [sys.executable, "-m", "jobs.generate", f"out={tmp_path / 'data' / 'raw'}", "impressions=8000"]
    subprocess.run(generate, check=True, cwd=ROOT, capture_output=True)
    shutil.copytree(tmp_path / "data" / "raw", tmp_path / "data" / "today")
    more: dict[str, list[str]] = {"train": ["train.batch_size=512", "train.max_steps=2"]}
    for job, args in DEMO.items():  # preprocess, train, nightly
        done = run_pod(tmp_path, job, [*args, *more.get(job, [])])
        outcomes = (0, 2, 3) if job == "nightly" else (0,)  # two steps are too few to be better than the base rate
        assert done.returncode in outcomes, done.stderr
    assert list((tmp_path / "runs" / "nightly").glob("*/night.json"))
