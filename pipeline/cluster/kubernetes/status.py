"""The state of a workload from what the cluster says of its main object, and of its pods where that does not say why."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from kubernetes import client

from features.printable import printable
from pipeline.cluster.base import State, Status, Workload
from pipeline.cluster.kubernetes.settings import KubernetesSettings

# A condition of a Job, JobSet or TrainJob to the state of its workload; the first that holds.
CONDITIONS: dict[str, State] = {
    "Complete": "succeeded",
    "Completed": "succeeded",
    "SuccessCriteriaMet": "running",
    "Failed": "failed",
    "Suspended": "suspended",
}


def of_one(
    cluster: KubernetesSettings, work: Workload, kind: str, part: Any, pods: Callable[[], list[client.V1Pod]]
) -> Status:
    """State of a workload by its main object.

    Args:
        part: the object of `kind`. pods: reads the workload's pods, only where they are needed.
    """
    if kind == "CronJob":
        return _of_cron_job(part.spec, part.status or client.V1CronJobStatus())
    if kind == "Deployment":
        return _of_deployment(part, pods())
    if kind == "Job":
        status = part.status or client.V1JobStatus()
        conditions = [(one.type, one.status, one.message) for one in status.conditions or []]
        counts = f"pods: {status.ready or 0} ready of {status.active or 0} active, "
        counts += f"{status.succeeded or 0} succeeded, {status.failed or 0} failed"
        is_ready, restarts = bool(status.ready), math.ceil((status.failed or 0) / work.nodes.most)
    else:
        raw = part.get("status") or {}
        conditions = [(one["type"], one["status"], one.get("message")) for one in raw.get("conditions") or []]
        jobs = [*raw.get("replicatedJobsStatus", []), *raw.get("jobsStatus", [])]
        is_ready = any(job.get("ready") for job in jobs)
        counts, restarts = "ready" if is_ready else "not ready yet", raw.get("restarts")
    for condition, holds, message in conditions:
        if holds != "True" or condition not in CONDITIONS:
            continue
        state = CONDITIONS[condition]
        if state == "suspended" and cluster.queue and not work.suspend:
            return Status("pending", f"waits in the queue {cluster.queue}", restarts)
        if state != "running":
            detail = message or condition
            return Status(state, printable(detail) + (_faults(pods()) if state == "failed" else ""), restarts)
    return Status("running", counts, restarts) if is_ready else Status("pending", counts + _faults(pods()), restarts)


def of_all(found: list[Status]) -> Status:
    """State of an array: it goes on until all have ended, and has succeeded if all have."""
    if len(found) == 1:
        return found[0]
    states = [one.state for one in found]
    order: list[State] = ["running", "pending", "suspended", "unknown", "stopped", "failed", "succeeded"]
    state = next(state for state in order if state in states)
    counts = ", ".join(f"{states.count(one)} {one}" for one in order if one in states)
    restarts = sum(one.restarts or 0 for one in found)
    return Status(state, f"of {len(found)}: {counts}", restarts)


def _of_cron_job(spec: Any, found: Any) -> Status:
    state: State = "suspended" if spec.suspend else "running" if found.active else "pending"
    return Status(state, f"schedule {spec.schedule} UTC, last started {found.last_schedule_time or 'never'}")


def _of_deployment(part: Any, pods: list[client.V1Pod]) -> Status:
    restarts = sum(one.restart_count or 0 for pod in pods for one in _containers(pod))
    if not part.spec.replicas:
        return Status("suspended", "scaled to 0 pods", restarts)
    ready = (part.status and part.status.ready_replicas) or 0
    return (
        Status("running", "1 pod ready", restarts)
        if ready
        else Status("pending", "no pod ready" + _faults(pods), restarts)
    )


def _containers(pod: client.V1Pod) -> Iterable[Any]:
    return (pod.status and pod.status.container_statuses) or []


def _faults(pods: list[client.V1Pod]) -> str:
    """Why pods do not run, or ended, each reason once: no node for them, no image, killed for memory."""
    reasons: dict[str, str] = {}
    for pod in pods:
        name = pod.metadata.name if pod.metadata else ""
        for condition in (pod.status and pod.status.conditions) or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                reasons.setdefault(f"{condition.reason}: {condition.message or 'no node'}", str(name))
        if pod.status and pod.status.reason:
            reasons.setdefault(f"{pod.status.reason}: {pod.status.message or ''}".rstrip(": "), str(name))
        for container in _containers(pod):
            state = container.state
            if state and state.waiting and state.waiting.reason != "ContainerCreating":
                reasons.setdefault(f"{state.waiting.reason}: {state.waiting.message or ''}".rstrip(": "), str(name))
            if state and state.terminated and state.terminated.exit_code:
                reasons.setdefault(f"{state.terminated.reason}, exit code {state.terminated.exit_code}", str(name))
    shown = [f"{name}: {printable(reason)[:200]}" for reason, name in list(reasons.items())[:3]]
    return "".join(f"; {one}" for one in shown)
