"""Settings of tracking, the same for jobs.train and jobs.evaluate."""

import re
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BaseModel, Field, model_validator

SECRET = re.compile(r"pass|pwd|token|secret|key", re.IGNORECASE)


def _fit_to_be_written_down(uri: str | None) -> str | None:
    """Raises ValueError for a tracking URI that has a password, as config.yaml would keep it, or names a file store."""
    if uri is None:
        return None
    parts = urlsplit(uri)
    if "@" in parts.netloc or any(SECRET.search(name) for name, _ in parse_qsl(parts.query)):
        raise ValueError(
            "holds a user or a password, and settings are written to config.yaml: set the environment variable "
            "MLFLOW_TRACKING_URI instead, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD beside an address without"
        )
    if parts.scheme in ("", "file"):
        raise ValueError("is a folder, which MLflow refuses since 3.13: use sqlite:////FOLDER/mlflow.db, or a server")
    return uri


class TrackingSettings(BaseModel):
    """Where figures go besides the run's own files; TensorBoard always has them.

    Attributes:
        tracking: mlflow sends parameters, metrics and the report to MLflow.
        tracking_uri: of MLflow; None: MLFLOW_TRACKING_URI of the environment, or else mlflow.db beside the run's folder.
        metrics_port: where Prometheus reads the newest figures, over HTTP without a password; None: nowhere.
        metrics_host: the address that listens on that port.
    """

    tracking: Literal["none", "mlflow"] = "none"
    tracking_uri: Annotated[str | None, AfterValidator(_fit_to_be_written_down)] = None
    metrics_port: int | None = Field(None, ge=1, le=65535)
    metrics_host: str = Field("127.0.0.1", min_length=1, max_length=253)

    @model_validator(mode="after")
    def _uri_belongs_to_mlflow(self) -> "TrackingSettings":
        if self.tracking_uri is not None and self.tracking != "mlflow":
            raise ValueError("tracking_uri is that of MLflow: set tracking=mlflow, or leave tracking_uri out")
        return self
