"""A state through the store: every value in its type, so that the next step cannot tell."""

from __future__ import annotations

import math

import torch

from toolchain.files.store import ObjectStore
from toolchain.quantize.refine.finetune_state import packed, unpacked


def test_a_state_comes_back_through_the_store(tmp_path):
    state = {
        "run": "mark",
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).reshape(2, 3)}}},
        "history": [0.1 + 0.2, math.inf],
        "best": None,
        "foreach": True,
        "tensor": "a text that is called like a tensor",
    }
    store = ObjectStore.open(tmp_path / "run", {})
    store.put("state", *packed(state))
    found = unpacked(*store.get("state"))
    moments = state["optimizer"]["state"].pop(0)
    again = found["optimizer"]["state"].pop(0)
    assert found == state
    assert all(torch.equal(again[name], moments[name]) for name in moments)
    assert again["step"].shape == ()


def test_real_optimizers_go_on_from_it(tmp_path):
    """Adam's own state: integer keys, tuples and tensors without dimensions."""
    ends = []
    for through in (False, True):
        weight = torch.tensor([1.0, -2.0], requires_grad=True)
        adam = torch.optim.Adam([weight], lr=0.1)
        for step in range(4):
            if through and step == 2:
                kept = weight.detach().clone()
                state = unpacked(*packed(adam.state_dict()))
                weight = kept.requires_grad_()
                adam = torch.optim.Adam([weight], lr=9.0)
                adam.load_state_dict(state)
            adam.zero_grad()
            weight.square().sum().backward()
            adam.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)
