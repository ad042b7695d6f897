"""Configs, geometries and bit plans of published models."""

from __future__ import annotations

from dataclasses import replace

from toolchain.plan.geometry import ModelGeometry, qwen2_vl_geometry
from toolchain.values import BitPlan, LayerPlan

QWEN2_VL_2B = {
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
    },
}

INTERNVL_1B = {
    "model_type": "internvl",
    "image_token_id": 151667,
    "downsample_ratio": 0.5,
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151674,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "use_mean_pooling": True,
    },
}


def qwen2_vl_2b() -> ModelGeometry:
    return qwen2_vl_geometry(QWEN2_VL_2B)


def qwen3_vl(size: str) -> ModelGeometry:
    """Decoder and tower sizes of Qwen3-VL 2B, 4B and 8B; "0.6B" is the language model alone with a 2B's tower."""
    layers, hidden, inner, heads = {
        "0.6B": (28, 1024, 3072, 16),
        "2B": (28, 2048, 6144, 16),
        "4B": (36, 2560, 9728, 32),
        "8B": (36, 4096, 12288, 32),
    }[size]
    tower = (27, 1152, 4304) if size == "8B" else (24, 1024, 4096)
    return ModelGeometry(size, layers, hidden, inner, heads, 8, 128, 151936, False, *tower, 16, 16, 2)


def rotated(plan: BitPlan, ending: str | tuple[str, ...], block: int = 64) -> BitPlan:
    """The plan with the inputs of every layer whose name ends so rotated."""
    layers = tuple(replace(x, rotation=block if x.name.endswith(ending) else 0) for x in plan.layers)
    return replace(plan, layers=layers)


def bit_plan(geometry: ModelGeometry, code: str = "4,8,8", head_code: str = "2,8,8") -> BitPlan:
    """Every linear of a Qwen2-VL-like model in `code`; embedding (and head) in `head_code`."""
    layers = []

    def add(
        name: str, part: str, rows: int, columns: int, group: str = "", *, tied: str | None = None, own: str = code
    ):
        layers.append(
            LayerPlan(
                name, part, "linear", rows, columns, group or name, own, "t-embedding" if tied else f"t-{part}", tied
            )
        )

    table = geometry.embedding_name
    queries, keys = geometry.query_heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    layers.append(
        LayerPlan(table, "embedding", "embedding", geometry.vocab, geometry.hidden, table, head_code, "t-embedding")
    )
    for i in range(geometry.vision_layers):
        block, width = f"model.visual.blocks.{i}", geometry.vision_embed
        add(f"{block}.attn.qkv", "vision", 3 * width, width)
        add(f"{block}.attn.proj", "vision", width, width)
        add(f"{block}.mlp.fc1", "vision", geometry.vision_intermediate, width)
        add(f"{block}.mlp.fc2", "vision", width, geometry.vision_intermediate)
    add("model.visual.merger.mlp.2", "projector", geometry.hidden, geometry.vision_embed * geometry.merge**2)
    for i in range(geometry.layers):
        block, hidden = f"model.language_model.layers.{i}", geometry.hidden
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            add(f"{block}.self_attn.{name}", "language", rows, hidden, f"{block}.qkv")
        add(f"{block}.self_attn.o_proj", "language", hidden, queries)
        for name in ("gate_proj", "up_proj"):
            add(f"{block}.mlp.{name}", "language", geometry.intermediate, hidden, f"{block}.gate_up")
        add(f"{block}.mlp.down_proj", "language", hidden, geometry.intermediate)
    add(
        "lm_head",
        "head",
        geometry.vocab,
        geometry.hidden,
        table,
        tied=table if geometry.tied_head else None,
        own=head_code,
    )
    kept = {
        "model.visual.blocks.0.norm1.weight": geometry.vision_embed,
        "model.language_model.norm.weight": geometry.hidden,
    }
    return BitPlan(tuple(layers), kept)
