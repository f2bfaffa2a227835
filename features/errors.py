"""Exceptions that end a job with a message for its user."""


class UserError(Exception):
    """Bad input, in one line: what, where (file, line or key), what to do. Jobs print it and exit with code 1."""


class Preempted(Exception):  # noqa: N818
    """A job was asked to end and has saved its work: the same command resumes. Jobs exit with code 75 (EX_TEMPFAIL)."""
