"""A loaded torch model as the three graphs that the generation loop runs: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from toolchain.device.families.base import Feeds
from toolchain.device.generation.answer import Graph, Graphs
from toolchain.models.family import Family, GraphSpec


def torch_graphs(family: Family, model: torch.nn.Module) -> Graphs:
    """vision, embed and decoder of `model`, run by torch in the model's own dtype and device; taps are returned too."""
    parameter = next(model.parameters())
    return {spec.name: _runner(spec, parameter.device, parameter.dtype) for spec in family.graphs(model)}


def _runner(spec: GraphSpec, device: torch.device, dtype: torch.dtype) -> Graph:
    def to_torch(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def run(feeds: Feeds) -> Feeds:
        plain = [to_torch(feeds[name]) for name in spec.input_names if not name.startswith("past.")]
        past = [to_torch(feeds[name]) for name in spec.input_names if name.startswith("past.")]
        pairs = list(zip(past[::2], past[1::2]))
        with torch.inference_mode():
            outputs = spec.module(*plain, pairs) if past else spec.module(*plain)
        return {name: t.float().cpu().numpy() for name, t in zip(spec.output_names, _flat(outputs), strict=True)}

    return run


def _flat(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    else:
        for item in outputs:
            yield from _flat(item)
