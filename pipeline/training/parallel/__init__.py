"""Distribution, applied to a model from outside."""
