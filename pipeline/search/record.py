"""metrics/search.jsonl: the architecture of a search at each of its evaluations."""

from typing import Annotated

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt

from features.plain_json import validated
from models.automtl.architecture import Architecture
from pipeline.run.run import Run
from pipeline.storage.files import read_lines

Share = Annotated[float, Field(ge=0, le=1)]


class SearchRecord(BaseModel):
    """A line.

    Attributes:
        step, rows: trained so far.
        valid_loss: mean loss of the validation batches that alpha has learnt from since the line before; None: of none.
        alpha_entropy, beta_entropy: mean entropy of their softmax over that of an even one, 1 to 0.
        interaction: softmax of alpha over the candidates of the interaction. experts: by expert, block and candidate.
        tasks: softmax of beta, by task and expert.
        unchanged: lines in a row, this one not among them, with the same architecture.
        architecture: the one that would be derived now.
    """

    step: NonNegativeInt
    rows: NonNegativeInt
    valid_loss: FiniteFloat | None
    alpha_entropy: Share
    beta_entropy: Share
    interaction: list[Share]
    experts: list[list[list[Share]]]
    tasks: list[list[Share]]
    unchanged: NonNegativeInt
    architecture: Architecture


def read(run: Run) -> list[SearchRecord]:
    """The lines, oldest first. Raises UserError for a damaged one."""
    return [validated(SearchRecord, line, run.search_metrics) for line in read_lines(run.search_metrics)]
