"""Ctrl-C held while a library would swallow it: told at once, raised at the end, and everything as before after it."""

from __future__ import annotations

import signal
import threading

import pytest

from toolchain.device.runtime.interrupts import held_interrupts


@pytest.fixture(autouse=True)
def usual_handler():
    """Python's own, which a test run in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_held_ctrl_c_is_told_and_comes_at_the_end():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with held_interrupts() as is_interrupted:
            seen.append(is_interrupted())
            signal.raise_signal(signal.SIGINT)
            seen.append(is_interrupted())

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGINT) is before


def test_without_ctrl_c_nothing_comes_and_an_error_stays_itself():
    before = signal.getsignal(signal.SIGINT)
    with held_interrupts() as is_interrupted:
        assert not is_interrupted()

    def fails() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        fails()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_ctrl_c_is_ignored_or_deadly_it_stays_so(handler):
    """As under nohup, and in jobs that a script puts into the background."""
    signal.signal(signal.SIGINT, handler)
    with held_interrupts() as is_interrupted:
        assert signal.getsignal(signal.SIGINT) is handler
        assert not is_interrupted()


def test_another_thread_holds_nothing():
    seen = []

    def work() -> None:
        with held_interrupts() as is_interrupted:
            seen.append(is_interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
