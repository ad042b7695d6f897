"""The two builders and runtimes of engines: what they are called, what they read, and how to get them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from toolchain.errors import EnvironmentMismatch, UnsupportedError


@dataclass(frozen=True)
class Backend:
    """A builder: its Python module, the bundle folder it reads, the command that installs it, what it has."""

    module: str
    graphs: str
    install: str
    is_on_board: bool  # plugins, a timing cache, memory pools, the board's own GPU


BACKENDS = {
    "tensorrt": Backend(
        "tensorrt",
        "device",
        "run this on the board, whose JetPack carries it (sudo apt install nvidia-jetpack python3-libnvinfer), or use "
        "--backend tensorrt_rtx here",
        True,
    ),
    "tensorrt_rtx": Backend("tensorrt_rtx", "portable", "pip install tensorrt-rtx-cu13", False),
}
DEFAULT_SM = "86"


def backend_named(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UnsupportedError: there is none.
    """
    if name not in BACKENDS:
        raise UnsupportedError(f"backend {name!r} is not known; use one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def load_backend(backend: str) -> ModuleType:
    """The builder's Python module.

    Raises:
        UnsupportedError: no such backend.
        EnvironmentMismatch: it is not installed, or its libraries do not load; the message says how to get it.
    """
    wanted = backend_named(backend)
    try:
        module = importlib.import_module(wanted.module)
    except ModuleNotFoundError:
        raise EnvironmentMismatch(
            f"backend {backend} needs the Python module {wanted.module}, found none; {wanted.install}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentMismatch(f"Python module {wanted.module} does not load ({error}); {wanted.install}") from None
    if not hasattr(module, "Builder"):
        raise EnvironmentMismatch(
            f"Python module {wanted.module} has no Builder: the package is a redirect; {wanted.install}"
        )
    return module
