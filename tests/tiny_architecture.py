"""The tiny Qwen2-VL that tests build: its config, for those that build one of their own."""

from __future__ import annotations

import copy

from toolchain.demo import architecture

TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
}
TINY_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}


def tiny_config(tokenizer):
    """The demo's Qwen2VLConfig, shrunk: hidden 64, 2 decoder layers, 2 vision blocks of 32."""
    from transformers import Qwen2VLConfig

    plain = copy.deepcopy(architecture.demo_config(tokenizer).to_dict())
    for part, changes in (("text_config", TINY_TEXT), ("vision_config", TINY_VISION)):
        plain[part] = {k: v for k, v in plain[part].items() if k not in ("layer_types", "head_dim")} | changes
    return Qwen2VLConfig(**plain)
