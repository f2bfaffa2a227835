"""Kubernetes: the cluster that a person's kubeconfig, or the pod this runs in, points at."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kubernetes import client, config
from urllib3.exceptions import HTTPError

from features.errors import UserError
from features.printable import printable
from pipeline.cluster.base import State, Status, Workload
from pipeline.cluster.kubernetes_manifests import INSTANCE, objects, to_yaml

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT_S = 30  # of one request
# A Job's condition to the state of its workload.
CONDITIONS: dict[str, State] = {"Complete": "succeeded", "Failed": "failed", "Suspended": "suspended"}


class _Connection(NamedTuple):
    """Clients of one cluster, and the namespace of a workload there."""

    core: client.CoreV1Api
    batch: client.BatchV1Api
    namespace: str
    host: str


class Kubernetes:
    """train is an Indexed Job with a headless Service, preprocess a Job, nightly a CronJob."""

    def render(self, work: Workload) -> str:
        """Manifests that `kubectl apply -f -` takes."""
        return to_yaml(objects(work))

    def submit(self, work: Workload) -> str:
        """Creates the objects of the workload, all of them or none."""
        to = _connect(work)
        create_of: dict[str, Any] = {
            "Service": to.core.create_namespaced_service,
            "Job": to.batch.create_namespaced_job,
            "CronJob": to.batch.create_namespaced_cron_job,
        }
        made: list[str] = []
        for part in objects(work):
            kind = str(part.kind)
            try:
                with _refusals(to, kind, work.name):
                    create_of[kind](to.namespace, part, _request_timeout=TIMEOUT_S)
            except UserError:
                if made == ["Service"]:
                    with suppress(client.ApiException, HTTPError):
                        to.core.delete_namespaced_service(work.name, to.namespace, _request_timeout=TIMEOUT_S)
                raise
            made.append(kind)
        verb = "get jobs" if work.job == "nightly" else f"logs -f --prefix --max-log-requests={work.nodes}"
        selected = f"-n {to.namespace} -l {INSTANCE}={work.name}"
        created = f"created {' and '.join(made)} {work.name} in namespace {to.namespace}"
        return f"{created}; follow it with: kubectl {verb} {selected}"

    def status(self, work: Workload) -> Status:
        """State of the Job, or for nightly of its CronJob: running while one of its Jobs is."""
        to = _connect(work)
        if work.job == "nightly":
            with _refusals(to, "CronJob", work.name):
                cron = to.batch.read_namespaced_cron_job_status(work.name, to.namespace, _request_timeout=TIMEOUT_S)
            return _cron_status(cron.spec, cron.status or client.V1CronJobStatus())
        with _refusals(to, "Job", work.name):
            found = to.batch.read_namespaced_job_status(work.name, to.namespace, _request_timeout=TIMEOUT_S)
        return _job_status(found.status or client.V1JobStatus())

    def logs(self, work: Workload) -> Iterator[str]:
        """Lines of every pod that has started, pod by pod in the order of their names, without control characters."""
        to = _connect(work)
        selector = f"{INSTANCE}={work.name}"
        with _refusals(to, "pods of", work.name):
            pods = to.core.list_namespaced_pod(to.namespace, label_selector=selector, _request_timeout=TIMEOUT_S).items
        started = [pod.metadata for pod in pods if pod.metadata and pod.status and pod.status.phase != "Pending"]
        for name in sorted(str(metadata.name) for metadata in started):
            with _refusals(to, "pod", name):
                text = to.core.read_namespaced_pod_log(name, to.namespace, _request_timeout=TIMEOUT_S)
            yield from (f"{name}: {printable(line)}" for line in text.replace("\t", " ").splitlines())

    def stop(self, work: Workload) -> None:
        """Deletes the objects of the workload and with them its pods, which get SIGTERM."""
        to = _connect(work)
        delete_of: dict[str, Any] = {
            "Service": to.core.delete_namespaced_service,
            "Job": to.batch.delete_namespaced_job,
            "CronJob": to.batch.delete_namespaced_cron_job,
        }
        for part in reversed(objects(work)):  # the Job before the Service that its pods meet through
            kind = str(part.kind)
            with _refusals(to, kind, work.name):
                delete_of[kind](work.name, to.namespace, propagation_policy="Background", _request_timeout=TIMEOUT_S)


def _job_status(found: client.V1JobStatus) -> Status:
    for condition in found.conditions or []:
        if condition.status == "True" and condition.type in CONDITIONS:
            return Status(CONDITIONS[condition.type], condition.message or condition.type)
    active, ready = found.active or 0, found.ready or 0
    counts = f"pods: {ready} ready of {active} active, {found.succeeded or 0} succeeded, {found.failed or 0} failed"
    return Status("running" if ready else "pending", counts)


def _cron_status(spec: client.V1CronJobSpec, found: client.V1CronJobStatus) -> Status:
    state: State = "suspended" if spec.suspend else "running" if found.active else "pending"
    return Status(state, f"schedule {spec.schedule} UTC, last started {found.last_schedule_time or 'never'}")


def _connect(work: Workload) -> _Connection:
    """Clients for the current context, or for the cluster this runs in."""
    try:
        config.load_kube_config()
        namespace = config.list_kube_config_contexts()[1]["context"].get("namespace", "default")
    except (config.ConfigException, yaml.YAMLError, OSError, TypeError, LookupError, AttributeError) as outside:
        # The client does not check what a kubeconfig looks like before it walks through it.
        try:
            config.load_incluster_config()
            namespace = NAMESPACE_FILE.read_text().strip()
        except (config.ConfigException, OSError):
            raise UserError(
                f"no usable kubeconfig ({str(outside).rstrip('.')}): set KUBECONFIG to a file with a context "
                "(kubectl config get-contexts lists them), or print the manifests with dry_run=true"
            ) from None
    settings = client.Configuration.get_default_copy()
    settings.retries = False  # urllib3 would log each retry: a cluster that does not answer is one line
    api = client.ApiClient(settings)
    return _Connection(client.CoreV1Api(api), client.BatchV1Api(api), work.namespace or namespace, settings.host)


@contextmanager
def _refusals(to: _Connection, kind: str, name: str) -> Iterator[None]:
    """Turns a request that fails into a UserError of one line."""
    try:
        yield
    except HTTPError as error:
        raise UserError(
            f"{kind} {name}: the cluster at {to.host} does not answer ({error}). Check the context and the network."
        ) from None
    except client.ApiException as error:
        try:
            reason = json.loads(error.body or "")["message"]
        except (ValueError, KeyError, TypeError):
            reason = f"{error.status} {error.reason}"
        line = f"{kind} {name} in namespace {to.namespace}: the cluster refuses: {reason}"
        if error.status == 409:
            delete = f"kubectl delete -n {to.namespace} {kind.lower()} {name}"
            line += f". Choose another name=, or delete it: {delete}"
        raise UserError(line) from None
