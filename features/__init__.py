"""What a row means: schema, parsing, joins, statistics, encoders, batches."""

import logging
import os

# Polars sizes its thread pool when it is imported, so this must come before any module of ours that imports it, in
# processes that Beam starts too. One thread: a process is one worker, and other processes run beside it.
os.environ.setdefault("POLARS_MAX_THREADS", "1")

# torch warns library authors of a renamed function once torchrec is imported.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
