"""Figures of a run: CSV always, TensorBoard where installed; a resumed run continues both, no line double."""

import csv
import io
import logging
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)


class CSVTable:
    """`step,<columns>`; a row with new columns adds them, empty in the rows before.

    resume_step: rows of later steps go; the run that wrote them was killed after its last checkpoint, and
        they will be written again.
    """

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        self.columns: list[str] = []
        if not path.exists():
            return
        rows = [row for row in self._read() if int(row["step"]) <= resume_step]
        if rows:
            self._rewrite(rows)
        else:
            self.columns = []
            path.unlink()

    def add(self, step: int, values: Mapping[str, float]) -> None:
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
        beside = self.path.with_name(self.path.name + ".tmp")
        with beside.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)
        beside.replace(self.path)


class RunLogs:
    """`logs/train.csv`, `logs/validation.csv` and TensorBoard events of one run."""

    def __init__(self, folder: Path, resume_step: int = 0, tensorboard: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        names = ("train", "validation")
        self.tables = {name: CSVTable(folder / f"{name}.csv", resume_step) for name in names}
        self.events = self._open_events(folder, resume_step) if tensorboard else None

    @staticmethod
    def _open_events(folder: Path, resume_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("TensorBoard is not installed; figures go to %s only", folder)
            return None
        return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def add(self, table: str, step: int, values: Mapping[str, float]) -> None:
        self.tables[table].add(step, values)
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(f"{table}/{name}", value, step)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
