"""onnxruntime as something to profile: graph calls by wall clock, layers by its own profiling file.

onnxruntime takes the bodies of our functions apart while loading and names the pieces after the function, not after
the node. The graphs for the recorded pass are therefore copies in which every call has a function of its own
(`toolchain.bench.profile_onnx`), so that a piece says which call it is from; nothing else about them differs.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.device.families.base import Feeds, Host
from toolchain.device.generation.answer import CachePlan, Graph
from toolchain.device.generation.generate import GraphRunner, Runner
from toolchain.device.generation.ort_graphs import GRAPH_NAMES, open_session, session_graph
from toolchain.device.profile.layers import LayerTime
from toolchain.device.profile.measure import GraphCall
from toolchain.errors import EnvironmentMismatch

if TYPE_CHECKING:
    import onnxruntime

_INLINED = re.compile(r"_inlfunc_(\w+?_call\d+)_")
_KERNEL = "_kernel_time"
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class NamedGraph:
    """A graph whose function calls can be told apart: the model, and function name → the calling node's name."""

    model: bytes
    calls: Mapping[str, str]


Namer = Callable[[Path], NamedGraph]


class OrtBackend:
    """The three graphs of a folder in onnxruntime."""

    name = "ort"

    def __init__(self, folder: Path, host: Host, provider: str, namer: Namer) -> None:
        """`namer` makes the copy to record from a graph's file."""
        self._folder, self._host, self._provider, self._namer = folder, host, provider, namer

    @property
    def uses_gpu(self) -> bool:
        return self._provider != "cpu"

    def describe(self) -> dict[str, Any]:
        import onnxruntime

        return {
            "onnxruntime": onnxruntime.__version__,
            "provider": self._provider,
            "threads": f"onnxruntime's default on {os.cpu_count()} processors",
        }

    def open(self, capacity: int, layers: bool) -> OrtRecording:
        """A recording over fresh sessions.

        Raises:
            EnvironmentMismatch, InputDataError: as `open_session`.
        """
        paths = {name: self._folder / f"{name}.onnx" for name in GRAPH_NAMES}
        if not layers:
            sessions = {name: open_session(path, self._provider) for name, path in paths.items()}
            return OrtRecording(sessions, self._host, capacity, {})
        named = {name: self._namer(path) for name, path in paths.items()}
        folder = tempfile.TemporaryDirectory(prefix="mgvq-profile-")
        recording = {
            name: _recorded_session(graph, paths[name], self._provider, Path(folder.name) / name)
            for name, graph in named.items()
        }
        return OrtRecording(recording, self._host, capacity, {n: g.calls for n, g in named.items()}, folder)


class OrtRecording:
    """A runner over sessions; `calls` has every call of a graph, in order."""

    def __init__(
        self,
        sessions: Mapping[str, onnxruntime.InferenceSession],
        host: Host,
        capacity: int,
        names: Mapping[str, Mapping[str, str]],
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self.calls: list[GraphCall] = []
        self._sessions, self._names, self._folder = sessions, names, folder
        graphs = {name: self._timed(name, session_graph(session)) for name, session in sessions.items()}
        decoder = host.settings["decoder"]
        self.runner: Runner = GraphRunner(graphs, decoder, host.axes, capacity, CachePlan())

    def _timed(self, name: str, graph: Graph) -> Graph:
        def run(feeds: Feeds) -> Feeds:
            began = time.perf_counter()
            outputs = graph(feeds)
            self.calls.append(GraphCall(name, 1000 * (time.perf_counter() - began)))
            return outputs

        return run

    def layers(self) -> list[list[LayerTime]]:
        """As `Recording.layers`: from each session's profiling file, which is removed."""
        if self._folder is None:
            return [[] for _ in self.calls]
        found = {}
        for name, session in self._sessions.items():
            path = Path(session.end_profiling())
            events = json.loads(path.read_text(encoding="utf-8"))
            made = sum(call.graph == name for call in self.calls)
            found[name] = iter(layers_from_events(events, made, self._names[name]))
        self._folder.cleanup()
        return [next(found[call.graph]) for call in self.calls]


def layers_from_events(
    events: Sequence[Mapping[str, Any]], calls: int, names: Mapping[str, str]
) -> list[list[LayerTime]]:
    """Layers of each call, from the events of one profiling file (microseconds; one "model_run" a call).

    A node inside another one (the body of an If or a Loop) is left out: the outer one's time holds it.

    Args:
        names: function name → node name, for pieces of functions (`NamedGraph.calls`).

    Raises:
        EnvironmentMismatch: the file has another number of calls than were made: it was cut.
    """
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "Session" and e["name"] == "model_run")
    if len(runs) != calls:
        raise EnvironmentMismatch(
            f"onnxruntime's profile has {len(runs)} calls, expected {calls}: it keeps a limited number of events; "
            "profile with fewer --repeats or --tokens"
        )
    nodes = sorted(
        (e for e in events if e["cat"] == "Node" and e["name"].endswith(_KERNEL)), key=lambda e: (e["ts"], -e["dur"])
    )
    layers: list[list[LayerTime]] = [[] for _ in runs]
    at, busy_until = 0, -1
    for event in nodes:
        while at < len(runs) and event["ts"] > runs[at][1]:
            at, busy_until = at + 1, -1
        if at == len(runs):
            break
        if event["ts"] < runs[at][0] or event["ts"] + event["dur"] <= busy_until:
            continue
        busy_until = max(busy_until, event["ts"] + event["dur"])
        layers[at].append(LayerTime(node_name(event["name"][: -len(_KERNEL)], names), event["dur"] / 1000))
    return layers


def node_name(event: str, names: Mapping[str, str]) -> str:
    """The node an event belongs to: the calling one for a piece of a function."""
    piece = _INLINED.match(event)
    return names.get(piece.group(1), event) if piece else event


def _recorded_session(graph: NamedGraph, path: Path, provider: str, prefix: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    wanted = open_session(path, provider).get_providers()[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    options.add_session_config_entry(_FOLDER_KEY, str(path.parent))
    return onnxruntime.InferenceSession(graph.model, options, providers=[wanted])
