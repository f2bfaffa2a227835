"""What the pods of a workload reach and are reached by: a NetworkPolicy each, and a headless Service for several nodes."""

from typing import Any

from kubernetes import client

from pipeline.cluster.base import Workload
from pipeline.cluster.kubernetes.pod import PORT, labels, selector
from pipeline.cluster.kubernetes.settings import KubernetesSettings

DNS_CACHE = "169.254.20.10/32"  # where NodeLocal DNSCache listens, outside of any pod


def network_policy(cluster: KubernetesSettings, work: Workload, head: dict[str, Any]) -> client.V1NetworkPolicy:
    """Pods of train talk to each other on any port, for gloo and NCCL choose theirs; all others accept nothing.

    The rendezvous of torchrun and gloo do not authenticate clients. Nothing else goes out but DNS and what the networks
    of `egress` get; volumes are the node's traffic.
    """
    own = client.V1NetworkPolicyPeer(pod_selector=selector(work))
    networks = [client.V1NetworkPolicyPeer(ip_block=client.V1IPBlock(cidr=cidr)) for cidr in cluster.egress]
    name_server = client.V1NetworkPolicyPeer(
        namespace_selector=client.V1LabelSelector(match_labels={"kubernetes.io/metadata.name": "kube-system"}),
        pod_selector=client.V1LabelSelector(match_labels={"k8s-app": "kube-dns"}),
    )
    name_cache = client.V1NetworkPolicyPeer(ip_block=client.V1IPBlock(cidr=DNS_CACHE))
    names = client.V1NetworkPolicyEgressRule(
        to=[name_server, name_cache],
        ports=[client.V1NetworkPolicyPort(protocol=protocol, port=53) for protocol in ("UDP", "TCP")],
    )
    spread = work.kind.spread
    peers = [*([own] if spread else []), *networks]
    return client.V1NetworkPolicy(
        **head,
        spec=client.V1NetworkPolicySpec(
            pod_selector=selector(work),
            policy_types=["Ingress", "Egress"],
            # The client's stub calls it var_from, which is dropped without a word, and a rule without from admits all.
            ingress=[client.V1NetworkPolicyIngressRule(_from=[own])] if spread else [],  # type: ignore[call-arg]
            egress=[names, client.V1NetworkPolicyEgressRule(to=peers)] if peers else [],
        ),
    )


def service(work: Workload, head: dict[str, Any]) -> client.V1Service:
    """Headless: it only gives pod 0 the name JOB-0.SERVICE, and before that pod is ready, for the others wait there."""
    return client.V1Service(
        **head,
        spec=client.V1ServiceSpec(
            cluster_ip="None",
            publish_not_ready_addresses=True,
            selector=labels(work),
            ports=[client.V1ServicePort(name="rendezvous", port=PORT)],
        ),
    )
