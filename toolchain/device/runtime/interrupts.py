"""Ctrl-C while a native library calls back into Python: it swallows what a callback raises, KeyboardInterrupt too."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Whether ctrl-C was pressed, as a function; the KeyboardInterrupt itself comes when the block ends well.

    Only the main thread gets signals: elsewhere nothing is held, and nothing can come. Nor is anything where ctrl-C is
    ignored, as under nohup, or ends the process.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
