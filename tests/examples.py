"""How many examples hypothesis draws."""

import os

SHARE = int(os.environ.get("TASKFUSE_EXAMPLES_DIVISOR", "1"))


def examples(count: int) -> int:
    """`count`, or the share of it that `make check` asks for, which runs often; `make test` draws all of them."""
    return max(10, count // SHARE) if count > 10 else count
