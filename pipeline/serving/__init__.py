"""A package, made of a checkpoint, and what answers from it without the library that trained it."""
