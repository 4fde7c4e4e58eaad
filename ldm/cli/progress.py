"""Progress bars that suit a terminal and a log file."""

import sys

from tqdm.auto import tqdm


def progress_bar(total: int | None, text: str) -> tqdm:
    """A bar counting images, on stderr."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=text,
        unit="image",
        dynamic_ncols=True,
        # A terminal follows every tenth of a second; a log file should not.
        mininterval=0.1 if terminal else 15.0,
        maxinterval=10.0 if terminal else 60.0,
    )
