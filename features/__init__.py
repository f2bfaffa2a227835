"""What a row means: schema, statistics, encoders, Batch."""

import logging

# torch tells library authors about a renamed function whenever torchrec is imported.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
