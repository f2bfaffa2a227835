"""What a row means: schema, statistics, encoders, Batch."""

import logging
import os

# A process is one worker, and what runs beside it are other processes; polars reads this when it is imported.
os.environ.setdefault("POLARS_MAX_THREADS", "1")

# torch tells library authors about a renamed function whenever torchrec is imported.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
