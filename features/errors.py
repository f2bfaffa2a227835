"""The one exception that is meant for a person."""


class UserError(Exception):
    """Bad input, said in one line: what, where (file, line or key), what to do. Jobs print it and exit with code 1."""
