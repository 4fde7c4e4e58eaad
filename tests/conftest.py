import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

import reference_data  # noqa: E402  (found through the line above)


def pytest_addoption(parser):
    parser.addoption(
        "--largest-errors",
        action="store_true",
        help="at the end, list the largest relative error that each test saw (without -n)",
    )


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--largest-errors"):
        return
    terminalreporter.section("largest relative error of each test")
    for test, error in sorted(reference_data.LARGEST_ERRORS.items()):
        terminalreporter.write_line(f"{error:.1e}  {test}")
