"""What ends a job and is meant for a person."""


class UserError(Exception):
    """Bad input, said in one line: what, where (file, line or key), what to do. Jobs print it and exit with code 1."""


class Preempted(Exception):  # noqa: N818
    """A job was told to end and has kept what it did: the same command goes on. Jobs exit with code 75 (EX_TEMPFAIL)."""
