"""PyTorch as something to profile, on a workstation: layers are modules, each with the time that is its own.

A module's own time is what passes between entering and leaving it, less that of the modules inside it. Hooks take it,
so the second pass is slower than the first; on a GPU they also wait for it at every module.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.folder import open_checkpoint
from toolchain.checkpoint.loading import load_any
from toolchain.device.families.base import Feeds, Host
from toolchain.device.generation.answer import CachePlan, Graph
from toolchain.device.generation.generate import GraphRunner, Runner
from toolchain.device.profile.layers import LayerTime
from toolchain.device.profile.measure import GraphCall
from toolchain.errors import EnvironmentMismatch
from toolchain.models.registry import family_for
from toolchain.models.runner import torch_graphs


class TorchBackend:
    """A checkpoint folder, quantized or not, run by PyTorch."""

    name = "torch"

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the model.

        Raises:
            EnvironmentMismatch: the device is not here.
            InputDataError, UnsupportedError: as `load_model` and `load_quantized`.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise EnvironmentMismatch(
                f"device {device}: PyTorch {torch.__version__} sees no GPU; run mgvq doctor, or use --provider cpu"
            )
        checkpoint = open_checkpoint(folder)
        self._device, self._dtype = torch.device(device), dtype
        self._model = load_any(checkpoint, dtype).to(self._device)
        self._family = family_for(checkpoint.config)
        self.host: Host = self._family.load_host(checkpoint.config, folder)

    @property
    def uses_gpu(self) -> bool:
        return self._device.type == "cuda"

    def describe(self) -> dict[str, Any]:
        where = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        threads = {} if self._device.type == "cuda" else {"threads": torch.get_num_threads()}
        return {"torch": torch.__version__, "device": where, "dtype": str(self._dtype).removeprefix("torch.")} | threads

    def open(self, capacity: int, layers: bool) -> TorchRecording:
        watched = _Watched(self._model, self._device) if layers else None
        return TorchRecording(torch_graphs(self._family, self._model), self.host, capacity, watched)


class TorchRecording:
    """A runner over the model's three graphs."""

    def __init__(self, graphs: Mapping[str, Graph], host: Host, capacity: int, watched: _Watched | None) -> None:
        self.calls: list[GraphCall] = []
        self._layers: list[list[LayerTime]] = []
        self._watched = watched
        timed = {name: self._timed(name, graph) for name, graph in graphs.items()}
        self.runner: Runner = GraphRunner(timed, host.settings["decoder"], host.axes, capacity, CachePlan())

    def _timed(self, name: str, graph: Graph) -> Graph:
        def run(feeds: Feeds) -> Feeds:
            began = time.perf_counter()
            outputs = graph(feeds)  # ends with a copy to the host, which waits for the device
            self.calls.append(GraphCall(name, 1000 * (time.perf_counter() - began)))
            self._layers.append(self._watched.take() if self._watched else [])
            return outputs

        return run

    def layers(self) -> list[list[LayerTime]]:
        if self._watched:
            self._watched.remove()
        return self._layers


class _Watched:
    """Hooks on every named module; `take` gives the own times since the last one."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._wait = device.type == "cuda"
        self._taken: list[LayerTime] = []
        self._open: list[list[float]] = []  # (began, seconds of the modules inside) of the modules under way
        self._handles = []
        for name, module in model.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._leaver(name), always_call=True))

    def take(self) -> list[LayerTime]:
        found, self._taken = self._taken, []
        return found

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._open.append([self._now(), 0.0])

    def _leaver(self, name: str):
        # An operator beside the path marks a module without a dot, such as lm_head, as a path.
        layer = f"{name}/forward"

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            began, inner = self._open.pop()
            whole = self._now() - began
            self._taken.append(LayerTime(layer, 1000 * (whole - inner)))
            if self._open:
                self._open[-1][1] += whole

        return leave

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()
