"""Names of tensors in a checkpoint. Within a ranker they are those of models.ranker (table_weight and its like).

A checkpoint's part `model` has the names of the ranker, and of what else is learnt; its parts `tables` and `dense` have those
of the training step, which holds the ranker, for the parameter that a state belongs to.
"""

RANKER = "ranker."  # where pipeline.training.step.TrainStep holds the model


def in_ranker(name: str) -> str:
    """A name of the training step as the ranker has it, and as it is in the part `model` of a checkpoint."""
    return name.removeprefix(RANKER)


def in_step(name: str) -> str:
    """A name of the ranker as the training step has it, and as it is in the parts `tables` and `dense`."""
    return RANKER + name
