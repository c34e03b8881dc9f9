"""The log of a command: what a person should know on stderr, all of it in a file of the store."""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from m2mkd_ray.execution import Store

LOGS = ".logs"
"""Folder of a local store with the logs of runs and of defects."""
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class Log:
    """Handlers of the package's log, from `open` to `close`."""

    def __init__(self) -> None:
        self._handlers: list[logging.Handler] = []
        self._console: Console | None = None
        self.file: Path | None = None
        """The file that `keep` writes."""

    @property
    def console(self) -> "Console":
        """The terminal on stderr, which a live table shares with the log."""
        from rich.console import Console

        if self._console is None:
            self._console = Console(stderr=True)
        return self._console

    def open(self) -> None:
        """Send warnings to stderr; other libraries' too."""
        if sys.stderr.isatty():
            from rich.logging import RichHandler

            self._add(RichHandler(console=self.console, show_path=False), logging.WARNING, "%(message)s")
        else:
            self._add(logging.StreamHandler(), logging.WARNING, "%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._handlers[0].addFilter(_is_not_said_at_the_end)

    def say_more(self, verbose: int) -> None:
        """Show INFO (1) or DEBUG (2) of this package on stderr too."""
        level = _LEVELS[min(verbose, len(_LEVELS) - 1)]
        self._handlers[0].setLevel(level)
        logging.getLogger("m2mkd_ray").setLevel(level)

    def keep(self, file: Path) -> None:
        """Write INFO and above to a file as well, tracebacks of failed stages included."""
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, encoding="utf-8")
        self.file = file
        self._add(handler, logging.INFO, "%(asctime)s %(levelname)s %(name)s: %(message)s")
        ours = logging.getLogger("m2mkd_ray")
        ours.setLevel(min(ours.level or logging.INFO, logging.INFO))

    def close(self) -> None:
        """Take the handlers off again."""
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        self._handlers.clear()
        logging.getLogger("m2mkd_ray").setLevel(logging.NOTSET)

    def _add(self, handler: logging.Handler, level: int, form: str) -> None:
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(form))
        self._handlers.append(handler)
        logging.getLogger().addHandler(handler)


def log_file(store: "Store", kind: str) -> Path | None:
    """Where the log of a command belongs; None if the store is not a folder on this machine."""
    if "://" in store.root:
        return None
    return Path(store.root) / LOGS / f"{kind}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.log"


def _is_not_said_at_the_end(record: logging.LogRecord) -> bool:
    """The end of a run names every failure, so its tracebacks go to the file alone."""
    return not (record.name == "m2mkd_ray.execution.executor" and record.levelno == logging.ERROR)
