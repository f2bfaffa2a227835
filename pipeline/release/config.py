"""Settings of jobs.nightly."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from features.regular_files import RelativePath
from features.schema.schema import Split
from models.table_storage import Precision
from pipeline.dataset.days import MissingDays, day_of
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.weights import Loading, Tables
from pipeline.storage.store_path import Place


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataGates(_Strict):
    """What the day's data must satisfy before models are judged on it; None: no such gate.

    Attributes:
        psi: the largest population stability index of a feature from the dataset of the encoders, less what chance explains.
        missing, unknown: by how much a feature's share of missing values, or of unseen ids among its values, may rise.
        absent: the largest share of the rows of files that lack an optional column.
        base_rate: a binary task's mean label lies within these factors of the train split's; any task has one if it had then.
        rows: the day's rows lie within these factors of the median of the last nights' that were not beyond it.
        nights: how many of them.
        action: stop ends the night as undecided, before models are scored; warn names the violations and goes on.
    """

    psi: float | None = Field(0.5, gt=0)
    missing: float | None = Field(0.2, gt=0, le=1)
    unknown: float | None = Field(0.3, gt=0, le=1)
    absent: float | None = Field(0.2, gt=0, le=1)
    base_rate: tuple[float, float] | None = (0.5, 2.0)
    rows: tuple[float, float] | None = (0.5, 2.0)
    nights: int = Field(7, ge=1)
    action: Literal["stop", "warn"] = "stop"

    @model_validator(mode="after")
    def _factors_around_1(self) -> "DataGates":
        for name, factors in (("base_rate", self.base_rate), ("rows", self.rows)):
            if factors and not 0 <= factors[0] <= 1 <= factors[1]:
                raise ValueError(f"{name}: {list(factors)} are no factors [LOW, HIGH] with LOW <= 1 <= HIGH")
        return self


class TrainStep(_Strict):
    """How a night trains its candidate.

    Attributes:
        args: settings of jobs.train, but dataset, days, run and train.init_from, which the night gives.
        ranks: more than 1 train by jobs.launch.
        init_from: the run whose weights it starts from where no earlier night has passed; None: the serving one, if any.
    """

    args: list[str] = []
    ranks: int = Field(1, ge=1)
    init_from: Place | None = None

    @model_validator(mode="after")
    def _leaves_the_nights_own_alone(self) -> "TrainStep":
        own = ("dataset", "days", "missing_days", "run", "train.init_from")
        for word in self.args:
            if (key := word.partition("=")[0].lstrip("+~")) in own:
                raise ValueError(f"args: {key} is given by the night: leave it out")
        return self


class NightlyConfig(MeasureConfig):
    """Settings of jobs.nightly, with those of what is measured; jobs/conf/nightly.yaml has a comment on each.

    Attributes:
        run, step: the candidate's; step None: the newest. Without `run`, `train` trains one.
        days: a folder of datasets of days with the encoders of the models: the day is added to it if it is not there.
        serving, serving_step: what it is compared with; None: that of OUT/serving.json, if there is one.
        best: a split; of the candidate's run the best checkpoint there, as eval.jsonl has it, is scored too, for the record.
        gates: a gates.yaml; None: RUN/gates.yaml if there is one, else `max_increase` of each headline metric.
        bless: pass moves OUT/serving.json to a candidate that passes; back moves it one back, and does nothing else.
        withdraw: with back, the night whose checkpoint is withdrawn: the same command may then be repeated.
        keep_served: entries of OUT/serving.json, the current one included; their checkpoints are not pruned.
        again: judge a date that was judged before anew.
        batch_size: rows of a batch, on each rank. ranks: processes of this machine that score a model together.
        decay_nights, decay_confidence: see pipeline.release.trend.
    """

    run: Place | None = None
    step: int | None = Field(None, ge=0)
    train: TrainStep | None = None
    days: Place | None = None
    serving: Place | None = None
    serving_step: int | None = None
    best: Split | None = None
    input: str | None = None
    out: Place
    date: Annotated[RelativePath, Field(pattern=r"^[^/]+$")]
    data_gates: DataGates = DataGates()
    gates: Place | None = None
    max_increase: float = Field(0.002, ge=0)
    bless: Literal["none", "pass", "back"] = "none"
    withdraw: str | None = None
    keep_served: int = Field(5, ge=2)
    again: bool = False
    batch_size: int = Field(8192, ge=1)
    ranks: int = Field(1, ge=1)
    tables: Tables = "all"
    table_precision: Precision = "fp32"
    max_bad_fraction: float = 0.001
    missing_days: MissingDays = "refuse"
    decay_nights: int = Field(3, ge=1)
    decay_confidence: float = Field(0.99, gt=0.5, lt=1)
    webhook: bool = False
    termination_message: Path | None = None

    @model_validator(mode="after")
    def _go_together(self) -> "NightlyConfig":
        if self.bless == "back":
            return self
        if self.withdraw is not None:
            raise ValueError("withdraw is of bless=back, which is not given")
        if (self.run is None) == (self.train is None):
            raise ValueError("give run=RUN, whose newest checkpoint is judged, or train=, which trains one; not both")
        if self.input is None:
            raise ValueError("input is missing: the folder with the day's raw logs")
        if self.train and self.days is None:
            raise ValueError("train needs days=, the folder of the datasets of days that it trains on")
        if self.train and self.step is not None:
            raise ValueError("step is of run=: a night that trains judges its newest checkpoint")
        if self.train and self.best is not None:
            raise ValueError("best is of run=, whose checkpoints jobs.evaluate has evaluated: leave it out with train=")
        if self.days and day_of(self.date) is None:
            raise ValueError(f"days needs a date as YYYY-MM-DD, which {self.date} is not")
        if self.serving is None and self.serving_step is not None:
            raise ValueError("serving_step is of serving=, which is not given")
        return self

    @property
    def folder(self) -> Path:
        """Where this night's results go."""
        return self.out / self.date

    @property
    def measure(self) -> MeasureConfig:
        """What is measured."""
        return MeasureConfig.model_validate(self.model_dump(include={*MeasureConfig.model_fields}))

    @property
    def loading(self) -> Loading:
        """How the tables are held."""
        return Loading(self.tables, self.table_precision)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a verdict depends on, which a night that is judged keeps."""
        how = {
            "out",
            "bless",
            "withdraw",
            "keep_served",
            "again",
            "webhook",
            "termination_message",
            "decay_nights",
            "decay_confidence",
            "ranks",
        }
        return self.model_dump(mode="json", exclude=how)
