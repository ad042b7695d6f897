"""Runs on the board, sent as text to its Python (3.8 or newer, nothing but the standard library): starts a command and
ends with its exit code, or stops it when the connection goes.

    python3 -I -c THIS COMMAND...       stdin stays open as long as somebody is there

The command gets its own process group. At the end of stdin the group is interrupted, as ctrl-C would, so that it can
save its state; terminated if that does not help, and killed in the end.
"""

import os
import signal
import subprocess
import sys
import threading

PATIENCE_SECONDS = (30.0, 10.0, 5.0)  # after interrupt, terminate, kill


def run(command: list[str], patience: tuple[float, ...] = PATIENCE_SECONDS) -> int:
    """The exit code of `command` (negative signals as a shell shows them: 128 + signal)."""
    # A login whose processes ignore it would hand that on, and the verb could not be stopped in time to save its state.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=stop_at_end_of_input, args=(process, patience), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def stop_at_end_of_input(process: subprocess.Popen[bytes], patience: tuple[float, ...]) -> None:
    while os.read(0, 4096):
        pass
    for number, seconds in zip((signal.SIGINT, signal.SIGTERM, signal.SIGKILL), patience):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
