"""The `mgvq` command: one verb per arrow. A verb parses, calls one function, and prints what it returned.

May import everything.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (see `toolchain.errors`). Data goes to stdout, everything else to stderr."""
    import typer

    from toolchain.cli.app import app
    from toolchain.errors import EnvironmentMismatch, MgvqError

    # click's ClickException, which typer imports or carries within itself, depending on its version.
    usage_problem: type[Any] = typer.BadParameter.mro()[2]
    try:
        result = app(args=list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
        return result if isinstance(result, int) else 0
    except MgvqError as error:
        return _fail(f"error: {error}", error.exit_code)
    except usage_problem as error:
        error.show(file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody to tell.
        sys.stderr.close()
        return 1
    except Exception as error:
        from toolchain.bundle.requirements import absent_package

        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            said = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
            return _fail(f"error: {said}; free some, or write elsewhere", EnvironmentMismatch.exit_code)
        if isinstance(error, ModuleNotFoundError) and (absence := absent_package(error)):
            return _fail(f"error: {absence}", EnvironmentMismatch.exit_code)
        import traceback

        traceback.print_exc()
        return _fail(f"unexpected failure: {type(error).__name__}: {error}; please report it with the lines above", 1)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
