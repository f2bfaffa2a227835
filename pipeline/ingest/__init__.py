"""The Beam job that turns raw logs into a dataset."""

import logging

# Beam warns on import about cloud clients that nobody asked for.
logging.disable(logging.WARNING)
import apache_beam  # noqa: E402, F401

logging.disable(logging.NOTSET)
logging.getLogger("apache_beam").setLevel(logging.ERROR)
