"""The tiny model of vq_samples.py, exported once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from vq_samples import VOCABULARY, WIDTH, TinyModel, tiny_graphs

from toolchain.graph.export import reference_graphs_from_model


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    return TinyModel().eval()


@pytest.fixture(scope="session")
def tiny_reference(tiny_model, tmp_path_factory) -> SimpleNamespace:
    """folder: reference graphs of the tiny model; exported: what the exporter said. Read only."""
    folder: Path = tmp_path_factory.mktemp("reference")
    family = SimpleNamespace(graphs=tiny_graphs)
    return SimpleNamespace(folder=folder, exported=reference_graphs_from_model(tiny_model, family, folder))


@pytest.fixture
def tiny_feeds() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return {
        "vision": {"pixels": rng.standard_normal((3, 3, 4, 6)).astype(np.float32)},
        "embed": {"ids": rng.integers(0, VOCABULARY, (2, 7))},
        "decoder": {"x": rng.standard_normal((3, 5, WIDTH)).astype(np.float32)},
    }
