"""Every error a caller can meet. The class says whose mistake it is and which exit code the command line ends with.

    MgvqError
    ├── UsageError            2   the command or the configuration is wrong
    ├── UnsupportedError      3   this model or target is not one we know
    ├── NumericGateError      4   a stage does not compute what it should
    ├── BudgetError           5   it does not fit the target's memory
    ├── EnvironmentMismatch   6   a library, driver or device is missing or of the wrong version
    ├── InputDataError        7   a file is missing, broken, or not what it claims to be
    └── StoppedError         75   stopped on request with the state saved

A message says what was expected, what was found, where, and what to do next, in one sentence or two.
`ShapeError` is for the mathematics: a tensor whose shape breaks a documented contract is our fault, exit code 1.
"""

from __future__ import annotations


class MgvqError(Exception):
    """Anything mgvq refuses. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(MgvqError):
    exit_code = 2


class UnsupportedError(MgvqError):
    exit_code = 3


class NumericGateError(MgvqError):
    exit_code = 4


class BudgetError(MgvqError):
    exit_code = 5


class EnvironmentMismatch(MgvqError):  # noqa: N818 - reads as what it is
    exit_code = 6


class InputDataError(MgvqError):
    exit_code = 7


class StoppedError(MgvqError):
    exit_code = 75


class ShapeError(MgvqError):
    """A tensor whose shape breaks a documented contract."""
