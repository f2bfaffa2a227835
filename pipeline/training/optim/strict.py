"""What settings of training have in common."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid")
