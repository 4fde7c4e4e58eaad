"""The command line: one file a verb. `ldm VERB --help` says what each takes.

Results go to stdout, everything else (progress, warnings, errors) to stderr. A command ends with status 0,
with 1 after a mistake in what it was asked or given, with 2 where the command line itself is wrong, with 130
when it was interrupted. A mistake is one message; a traceback is a bug of ours.
"""

import functools
import inspect
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import typer
import typer.core

#: verb -> (module, one line)
VERBS = {
    "train": ("ldm.cli.train", "Train an autoencoder or a diffusion model from a YAML config."),
    "sample": ("ldm.cli.sample", "Draw images from a trained diffusion model."),
    "encode": ("ldm.cli.encode", "Pass images through an autoencoder: reconstructions, figures, latents."),
    "convert": ("ldm.cli.convert", "Write a model for the original LDM, for diffusers, or as our own file."),
    "plan": ("ldm.cli.plan", "What a run would need: parameters, FLOPs, memory, the largest batch, hours."),
    "verify": ("ldm.cli.verify", "Read every image of a folder and name those that cannot be read."),
}
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_PLAIN_WORDS = {
    "valid integer": "whole number",
    "valid number": "number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
_SETTINGS = {"help_option_names": ["-h", "--help"]}


def run_verb(verb: str, arguments: list[str] | None = None, program: str | None = None) -> None:
    """Run one verb with these arguments (those of the process by default), then exit the process."""
    app = _app()
    _add(app, verb)
    _run(app, arguments, program or f"ldm {verb}")


def main() -> None:
    """The console command `ldm`."""
    app = _app()
    app.callback(invoke_without_command=True, context_settings=_SETTINGS)(_ldm)
    for verb in VERBS:
        _add(app, verb)
    _run(app, None, "ldm")


def _add(app: typer.Typer, verb: str) -> None:
    module, line = VERBS[verb]
    command = import_module(module).command
    # A line a paragraph, so that the terminal's width decides where lines break.
    page = "\n\n".join(" ".join(part.split()) for part in inspect.getdoc(command).split("\n\n"))
    options = {"cls": _Command, "help": page, "short_help": line, "context_settings": _SETTINGS}
    app.command(verb, **options)(_reporting(command))


def _ldm(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", metavar="", help="Print the version and stop."),
) -> None:
    """Latent diffusion, from a folder of images to samples."""
    if version:
        from ldm import __version__

        typer.echo(f"ldm {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


class _Command(typer.core.TyperCommand):
    """A verb whose usage line and mistakes are in plain words whatever the version of typer."""

    def collect_usage_pieces(self, ctx) -> list[str]:
        """MODEL, not {MODEL}."""
        return [re.sub(r"^\{(.*)\}", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def make_context(self, *args, **kwargs):
        try:
            return super().make_context(*args, **kwargs)
        except typer.BadParameter as error:
            error.message = _plain(error)
            raise


def _plain(error: typer.BadParameter) -> str:
    """`must be a whole number, got 'abc'` in the place of a validator's own sentence."""
    said = re.fullmatch(r"Input should be ([^,]*)(, .*)?", error.message)
    if said is None:
        return error.message
    wanted = said[1]
    for theirs, ours in _PLAIN_WORDS.items():
        wanted = wanted.replace(theirs, ours)
    details = getattr(error.__cause__, "errors", list)()
    return f"must be {wanted}" + (f", got {details[0]['input']!r}" if details else "")


def _app() -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _run(app: typer.Typer, arguments: list[str] | None, program: str) -> None:
    # Ours to be read, everybody else's only where it warns.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ldm").setLevel(logging.INFO)
    warnings.formatwarning = _warning
    sys.path.append(os.getcwd())  # where parts of the user's own lie; last, to hide none
    try:
        app(arguments, prog_name=program)
    except KeyboardInterrupt:  # while a module was still being imported
        _interrupted("")


def _reporting(command: Callable) -> Callable:
    """Mistakes of the user end in one clear message, an interruption in its own, the rest in a traceback."""

    @functools.wraps(command)
    def reported(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            _interrupted(str(stop))
        except BrokenPipeError:  # `ldm ... | head`: nobody is left to read
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ValueError, OSError) as error:
            if logging.getLogger("ldm").isEnabledFor(logging.DEBUG) or not _is_message(error):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    return reported


def _interrupted(text: str) -> None:
    print(f"\n{text or 'interrupted'}", file=sys.stderr)
    sys.exit(130)


def _is_message(error: Exception) -> bool:
    """Whether an error was written for the user: raised by the system, or on purpose in this package."""
    if isinstance(error, OSError) or type(error).__module__.startswith("ldm."):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename.startswith(_PACKAGE)


def _warning(message, category, filename: str, lineno: int, line: str | None = None) -> str:
    """A warning of this package without the line of code it came from."""
    if issubclass(category, UserWarning) and filename.startswith(_PACKAGE):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
