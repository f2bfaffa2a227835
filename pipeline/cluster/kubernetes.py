"""Creating objects on the cluster that a person's kubeconfig, or the pod this runs in, points at."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config
from urllib3.exceptions import HTTPError

from features.errors import UserError
from pipeline.cluster.base import Workload
from pipeline.cluster.kubernetes import objects

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
ANSWER_S = 30  # longer, and the cluster does not answer


def create(work: Workload) -> str:
    """Creates the objects of the workload, all of them or none.

    Returns:
        The namespace they are in.
    Raises:
        UserError: no usable kubeconfig, a cluster that does not answer, or an object it refuses.
    """
    api, here = _connect()
    namespace = work.namespace or here
    core, batch = client.CoreV1Api(api), client.BatchV1Api(api)
    create_of: dict[str, Any] = {
        "Service": core.create_namespaced_service,
        "Job": batch.create_namespaced_job,
        "CronJob": batch.create_namespaced_cron_job,
    }
    made: list[str] = []
    for part in objects(work):
        kind = str(part.kind)
        try:
            create_of[kind](namespace, part, _request_timeout=ANSWER_S)
        except (client.ApiException, HTTPError) as error:
            if made == ["Service"]:
                with suppress(client.ApiException, HTTPError):
                    core.delete_namespaced_service(work.name, namespace, _request_timeout=ANSWER_S)
            raise UserError(_refusal(error, kind, work.name, namespace, api.configuration.host)) from None
        made.append(kind)
    return namespace


def _connect() -> tuple[client.ApiClient, str]:
    """A client for the current context, or for the cluster this runs in, and the namespace to use there."""
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
                f"no cluster to submit to ({str(outside).rstrip('.')}): set KUBECONFIG to a file with a context "
                "(kubectl config get-contexts shows them), or print the YAML with dry_run=true."
            ) from None
    settings = client.Configuration.get_default_copy()
    settings.retries = False  # urllib3 would log each retry: a cluster that does not answer is one line
    return client.ApiClient(settings), namespace


def _refusal(error: Exception, kind: str, name: str, namespace: str, host: str) -> str:
    if not isinstance(error, client.ApiException):
        return f"{kind} {name}: the cluster at {host} does not answer ({error}). Check the context and the network."
    try:
        reason = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        reason = f"{error.status} {error.reason}"
    line = f"{kind} {name} was refused in namespace {namespace}: {reason}"
    if error.status == 409:
        line += f". Choose another name=, or delete it: kubectl delete -n {namespace} {kind.lower()} {name}"
    return line
