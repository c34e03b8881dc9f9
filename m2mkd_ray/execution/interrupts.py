"""Signals that end a driver, so that it can end its workers and give its locks back."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def interrupts(raise_at_once: bool) -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event (or KeyboardInterrupt); the second ends the process at once."""
    interrupted = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        interrupted.set()
        logger.warning("%s: ending workers; run the same command to go on", signal.Signals(number).name)
        if raise_at_once:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals are the main thread's; it has its own way to end us
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
