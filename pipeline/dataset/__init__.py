"""A dataset on disk: its manifest, how it is opened and read, verified and described."""
