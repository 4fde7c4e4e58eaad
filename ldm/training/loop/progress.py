"""Progress on stderr: a bar on a terminal, and a line now and then where stderr is a file."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

log = logging.getLogger(__name__)


class _Bar(tqdm):
    # tqdm's watching thread would change how data-loading workers are started.
    monitor_interval = 0


def _size() -> dict:
    """A terminal that does not know its size (a container's, say) would show nothing: say one."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}


class Progress:
    """Counts steps or images up to `total`, with figures beside the count.

    initial: what was done before, by a run that is resumed. title: what is being done.
    """

    #: Seconds between two lines where there is no terminal.
    INTERVAL = 15.0

    def __init__(self, total: int | None, unit: str, initial: int = 0, title: str = ""):
        self.total, self.unit, self.title = total, unit, title
        self.done = self._initial = self._told = initial
        self._figures = ""
        self._began = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            form = "{desc}{n_fmt}/{total_fmt} " + unit + "s |{bar:16}| {elapsed}<{remaining}{postfix}"
            desc = title and f"{title} "
            self._bar = _Bar(total=total, initial=initial, desc=desc, bar_format=form, **_size())

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last >= self.INTERVAL:
            self._line()

    def set_total(self, total: int) -> None:
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def show(self, figures: str) -> None:
        """Figures to stand beside the count from the next update on."""
        self._figures = figures
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            log.info("%s", text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self._figures and self._told != self.done:
            self._line()

    def _line(self) -> None:
        self._last, self._told = time.monotonic(), self.done
        parts = [self._figures] if self._figures else []
        if self.total is not None and self.done < self.total and self.done > self._initial:
            rate = (self._last - self._began) / (self.done - self._initial)
            parts.append(f"{tqdm.format_interval((self.total - self.done) * rate)} left")
        count = f"{self.title or self.unit} {self.done}/{self.total if self.total is not None else '?'}"
        log.info("%s", f"{count}: {', '.join(parts)}" if parts else count)


@contextmanager
def image_progress(title: str, shown: bool) -> Iterator:
    """What the data room takes as `progress`: a function of (images done, images in all), or None."""
    if not shown:
        yield None
        return
    progress = Progress(None, "image", title=title)

    def report(done: int, total: int) -> None:
        progress.set_total(total)
        progress.advance(done - progress.done)

    try:
        yield report
    finally:
        progress.close()
