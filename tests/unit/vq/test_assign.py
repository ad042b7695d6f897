from __future__ import annotations

import pytest
import torch

from toolchain.vq import assign
from toolchain.vq.assign import nearest_entries


def obvious_nearest(targets, metric, codebook, scales):
    """One row and one entry at a time, in float64."""
    found = []
    for target, scale in zip(targets.double(), scales.double()):
        costs = [(target - scale * entry) @ metric.double() @ (target - scale * entry) for entry in codebook.double()]
        found.append(int(torch.stack(costs).argmin()))
    return found


@pytest.mark.parametrize("vector", [2, 4])
def test_equals_the_obvious_search(vector):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(40, vector, generator=generator)
    root = torch.randn(vector, vector, generator=generator)
    codebook = torch.randn(32, vector, generator=generator)
    scales = 0.2 + torch.rand(40, generator=generator)
    found = nearest_entries(targets, root @ root.T, codebook, scales)
    assert found.dtype == torch.uint8
    assert found.tolist() == obvious_nearest(targets, root @ root.T, codebook, scales)


def test_the_metric_decides_by_hand():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([[0.6, 0.55]])
    ones = torch.ones(1)
    assert nearest_entries(target, torch.eye(2), codebook, ones).tolist() == [0]
    assert nearest_entries(target, torch.diag(torch.tensor([1.0, 9.0])), codebook, ones).tolist() == [1]
    # Coupled coordinates: being wrong by (+, −) is cheap, by (+, +) is dear.
    coupled = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    entries = torch.tensor([[0.3, 0.8], [0.4, 0.3]])
    assert nearest_entries(torch.tensor([[0.5, 0.5]]), coupled, entries, ones).tolist() == [0]


def test_taking_rows_in_pieces_changes_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    targets, codebook = torch.randn(50, 2, generator=generator), torch.randn(16, 2, generator=generator)
    whole = nearest_entries(targets, torch.eye(2), codebook, torch.ones(50))
    monkeypatch.setattr(assign, "SCORES_AT_A_TIME", 16 * 7)
    assert torch.equal(nearest_entries(targets, torch.eye(2), codebook, torch.ones(50)), whole)
