"""Slurm: a batch script for sbatch."""

from pipeline.cluster.base import Cluster


class Slurm(Cluster):
    """A Slurm cluster whose nodes share a file system with the machine that submits."""
