"""The Kubernetes backend: a workload as typed objects, and what the cluster says of them."""
