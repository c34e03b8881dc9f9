"""`m2mkd`: commands, the error boundary, exit codes.

    0    done
    1    an expected error (`M2mkdError`): the message says what to do
    2    a name, setting or option that was typed is wrong
    3    our defect: a log file has what a report of it needs
    130  interrupted; the store is left so that the same command goes on

stdout is the result, stderr the log.
"""

import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from m2mkd_ray import __version__
from m2mkd_ray.commands import data, doctor, jobs, listing, plan, results, run, sweep, tensorboard, watching
from m2mkd_ray.commands.log import log_file
from m2mkd_ray.commands.session import Session
from m2mkd_ray.errors import M2mkdError

EXIT_DEFECT = 3
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="m2mkd",
    help="Module-to-module knowledge distillation (m2mKD) of modular transformers on Ray and DeepSpeed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(plan.plan)
app.command()(run.run)
app.command()(results.status)
app.command()(watching.events)
app.command()(tensorboard.tensorboard)
app.command()(results.report)
app.command()(results.export)
app.command()(results.predict)
app.command()(jobs.submit)
app.command()(jobs.jobs)
app.command()(jobs.logs)
app.command()(jobs.stop)
app.add_typer(sweep.app, name="sweep")
app.add_typer(data.app, name="data")
app.add_typer(listing.app, name="list")
app.command()(doctor.doctor)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Module-to-module knowledge distillation (m2mKD) of modular transformers on Ray and DeepSpeed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; always ends the process, with one of the exit codes above."""
    now = Session(tuple(sys.argv[1:] if arguments is None else arguments))
    now.log.open()
    try:
        app(args=list(now.arguments), prog_name="m2mkd", obj=now)
    except M2mkdError as error:
        _say(f"Error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        _say(_defect(error, now))
        sys.exit(EXIT_DEFECT)
    finally:
        now.log.close()


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _defect(error: Exception, now: Session) -> str:
    """Write down what a report of a defect needs; returns what to say."""
    text = "\n\n".join([_command(now), _versions(), "".join(traceback.format_exception(error)), _recipe(now)])
    file = _write(text, now)
    return (
        f"m2mkd_ray has a defect: {type(error).__name__}: {error}\n"
        f"This is our mistake, not yours; the store is as it was. Please open an issue with the file {file}"
    )


def _command(now: Session) -> str:
    return f"command: m2mkd {shlex.join(now.arguments)}\nfolder: {os.getcwd()}"


def _versions() -> str:
    from m2mkd_ray.execution.worker import versions

    return "\n".join(f"{name}: {version}" for name, version in versions().items())


def _recipe(now: Session) -> str:
    if now.recipe is None:
        return "no recipe"
    from m2mkd_ray.recipe import to_yaml

    return f"recipe:\n{to_yaml(now.recipe)}"


def _write(text: str, now: Session) -> Path:
    """Into the store if that is a folder that can be written, else into the temporary folder."""
    in_store = log_file(now.store, "defect") if now.store is not None else None
    if in_store is not None and in_store.parent.parent.is_dir():
        try:
            in_store.parent.mkdir(exist_ok=True)
            in_store.write_text(text, encoding="utf-8")
            return in_store
        except OSError as error:
            _say(f"The log of the defect cannot be written to the store: {error}")
    file = Path(tempfile.gettempdir()) / f"m2mkd-defect-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.log"
    file.write_text(text, encoding="utf-8")
    return file
