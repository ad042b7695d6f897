"""The three graphs run by onnxruntime: the reference runtime on any machine, and the `run` backend off the board."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.device.families.base import Feeds
from toolchain.device.generation.answer import Graph, Graphs
from toolchain.errors import EnvironmentMismatch, InputDataError

if TYPE_CHECKING:
    import onnxruntime

GRAPH_NAMES = ("vision", "embed", "decoder")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(path: Path, provider: str = "cpu") -> onnxruntime.InferenceSession:
    """An onnxruntime session on the provider that was asked for, and on no other behind its back.

    Raises:
        EnvironmentMismatch: onnxruntime is not here, the provider is not in this build, or did not start.
        InputDataError: the file is missing or not a model.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise EnvironmentMismatch(
            "backend ort needs the Python module onnxruntime, found none; pip install onnxruntime, or use engines that "
            "mgvq build made: --backend tensorrt --engines DIR"
        ) from None
    wanted = _PROVIDERS[provider]
    if wanted not in onnxruntime.get_available_providers():
        raise EnvironmentMismatch(
            f"onnxruntime provider {provider!r}: this build has {onnxruntime.get_available_providers()}; "
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu, or use --provider cpu"
        )
    if not path.is_file():
        raise InputDataError(f"graph {path} does not exist; export it again")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[wanted])
    except Exception as error:  # onnxruntime's own exception types are not exported
        raise InputDataError(f"graph {path} does not load in onnxruntime: {error}") from error
    if session.get_providers()[0] != wanted:
        raise EnvironmentMismatch(
            f"onnxruntime provider {provider!r} did not start, it fell back to {session.get_providers()}; "
            "check the CUDA and cuDNN libraries (mgvq doctor), or use --provider cpu"
        )
    return session


def session_graph(session: onnxruntime.InferenceSession) -> Graph:
    """The session as a function from named arrays to named arrays."""
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Feeds) -> Feeds:
        return dict(zip(names, session.run(names, feeds)))

    return run


def ort_graphs(folder: Path, provider: str = "cpu") -> Graphs:
    """vision, embed and decoder of a folder of portable or reference graphs."""
    return {name: session_graph(open_session(folder / f"{name}.onnx", provider)) for name in GRAPH_NAMES}
