"""A package behind HTTP and JSON."""
