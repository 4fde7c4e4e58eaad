"""Figures of a run: CSV always, TensorBoard where installed, whatever `loggers:` names.

A resumed run continues them, no line double.
"""

import csv
import io
import logging
from collections.abc import Mapping
from pathlib import Path

from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from ldm.files import whole_file

log = logging.getLogger(__name__)


class CSVTable:
    """`step,<columns>`; a row with new columns adds them, empty in the rows before.

    resume_step: rows of later steps go; the run that wrote them was killed after its last checkpoint, and
        they will be written again.
    """

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        self.columns: list[str] = []
        self._last: int | None = None
        if not path.exists():
            return
        rows = [row for row in self._read() if int(row["step"]) <= resume_step]
        if rows:
            self._rewrite(rows)
        else:
            self.columns = []
            path.unlink()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._last:
            return  # a run that is told to stop logs once more what it logged last
        self._last = step
        row = {"step": str(step), **{key: f"{value:.6g}" for key, value in values.items()}}
        new = [key for key in row if key not in self.columns]
        if new:
            rows = self._read() if self.path.exists() else []
            self.columns += new
            self._rewrite([*rows, row])
            return
        with self.path.open("a", newline="") as file:
            self._writer(file).writerow(row)

    def _read(self) -> list[dict[str, str]]:
        text = self.path.read_bytes().decode(errors="replace")
        whole = text[: text.rfind("\n") + 1]  # a last line without its end was torn by a kill
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        self.columns = list(reader.fieldnames or [])
        return [row for row in reader if (row.get("step") or "").isdigit() and None not in row.values()]

    def _writer(self, file) -> csv.DictWriter:
        return csv.DictWriter(file, self.columns, restval="", extrasaction="ignore", lineterminator="\n")

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with whole_file(self.path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            writer = self._writer(text)
            writer.writeheader()
            writer.writerows(rows)
            text.detach()


class CSVLogs(Logger):
    """A Lightning logger: figures called `stage/name` become a row of `logs/<stage>.csv`."""

    def __init__(self, folder: Path, resume_step: int = 0):
        super().__init__()
        self.folder, self.resume_step = folder, resume_step
        self.tables: dict[str, CSVTable] = {}
        for path in sorted(folder.glob("*.csv")):
            self._table(path.stem)

    name = "csv"
    version = 0

    def _table(self, stage: str) -> CSVTable:
        if stage not in self.tables:
            self.tables[stage] = CSVTable(self.folder / f"{stage}.csv", self.resume_step)
        return self.tables[stage]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        stages: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            stage, slash, figure = name.partition("/")
            if slash:
                stages.setdefault(stage, {})[figure] = value
        for stage, figures in stages.items():
            self._table(stage).add(step or 0, figures)

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """The run's config.yaml has them."""


def make_loggers(folder: Path, resume_step: int, tensorboard: bool) -> list[Logger]:
    """The loggers of every run, in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = [CSVLogs(folder, resume_step)]
    if tensorboard:
        try:
            import tensorboard as _  # noqa: F401
        except ImportError:
            log.info("TensorBoard is not installed; figures go to %s only", folder)
        else:
            purge = resume_step + 1 if resume_step else None
            loggers.append(TensorBoardLogger(folder.parent, folder.name, "", purge_step=purge))
    return loggers
