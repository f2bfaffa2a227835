"""From a checkpoint to a package that answers alone."""
