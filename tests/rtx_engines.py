"""Engines of single graphs with TensorRT for RTX, which builds without a GPU: a compiler's verdict on what we write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest


def rtx_engine(path: Path, shapes: Sequence[dict], sm: str) -> int:
    """Bytes of the engine that TensorRT for RTX builds of a graph, with one profile for each of `shapes`."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    for each in shapes:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in each.items():
            profile.set_shape(name, low, usual, high)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, f"{path.name} parsed and did not build for SM{sm}"
    return plan.nbytes
