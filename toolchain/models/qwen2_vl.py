"""Qwen2-VL (arXiv 2409.12191): a ViT with rotary positions over whole images of any size, and a Qwen2 decoder.

Published checkpoints call the same modules `visual.…` and `model.…`; transformers renames them on loading, and all
names here are those of its module tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.models import configs
from toolchain.models import family as base
from toolchain.models.permutations import (
    FreePermutation,
    columns_of,
    decoder_permutations,
    free_permutation,
    norm_of,
    rows_of,
)
from toolchain.plan.images import CLIP_MEAN, CLIP_STD
from toolchain.values import LayerSpec

if TYPE_CHECKING:
    import torch

    from toolchain.plan.geometry import ModelGeometry

TOWER = "model.visual"
DECODER = "model.language_model"


class Qwen2VL(base.Family):
    name = "qwen2_vl"
    model_types = ("qwen2_vl",)

    def layers(self, config: configs.Config) -> tuple[LayerSpec, ...]:
        text, vision = configs.text_config(config), _vision(config)
        width, depth = vision["embed_dim"], vision["depth"]
        patch = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        specs = base.embedding_and_head(
            text, config, f"{DECODER}.embed_tokens", "lm_head", depth + 3 + text["num_hidden_layers"]
        )
        head = specs.pop()
        specs.append(_part("patch_embed.proj", "vision", "conv", width, patch, 1, False))
        for i in range(depth):
            inner = int(width * vision["mlp_ratio"])
            for name, rows, columns in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", inner, width),
                ("mlp.fc2", width, inner),
            ):
                specs.append(_part(f"blocks.{i}.{name}", "vision", "linear", rows, columns, 2 + i, True))
        merged = width * vision["spatial_merge_size"] ** 2
        specs.append(_part("merger.mlp.0", "projector", "linear", merged, merged, depth + 2, True))
        specs.append(_part("merger.mlp.2", "projector", "linear", vision["hidden_size"], merged, depth + 2, True))
        specs += base.decoder_layers(text, DECODER, depth + 3, biases=True)
        return (*specs, head)

    def free_permutations(self, config: configs.Config) -> tuple[FreePermutation, ...]:
        specs = {spec.name: spec for spec in self.layers(config)}
        merger = f"{TOWER}.merger.mlp"
        hidden = free_permutation(
            merger, specs[f"{merger}.2"].columns, [columns_of(f"{merger}.2")], rows_of(specs[f"{merger}.0"])
        )
        text, embedding = configs.text_config(config), f"{DECODER}.embed_tokens"
        decoder = decoder_permutations(text, specs, DECODER, embedding, "lm_head", feeder=f"{merger}.2")
        return (*_tower_permutations(_vision(config), specs), hidden, *decoder)

    def geometry(self, config: configs.Config) -> ModelGeometry:
        from toolchain.plan.geometry import qwen2_vl_geometry

        return qwen2_vl_geometry(config)

    def host_settings(self, config: configs.Config, folder: Path) -> dict[str, Any]:
        image, text = configs.image_settings(folder), configs.text_config(config)
        size = image.get("size") or {}
        stops = configs.stop_ids(config, folder)
        pad = text.get("pad_token_id", config.get("pad_token_id"))
        return {
            "family": self.name,
            "image": {
                "min_pixels": image.get("min_pixels") or size.get("shortest_edge", 56 * 56),
                "max_pixels": image.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280),
                "patch": image.get("patch_size", 14),
                "merge": image.get("merge_size", 2),
                "frames": image.get("temporal_patch_size", 2),
                "mean": list(image.get("image_mean", CLIP_MEAN)),
                "std": list(image.get("image_std", CLIP_STD)),
            },
            "tokens": {
                "image": "<|image_pad|>",
                "image_id": config["image_token_id"],
                "stop_ids": stops,
                "pad_id": stops[0] if pad is None else pad,
            },
            "decoder": decoder_settings(text),
        }

    def graphs(self, model: Any) -> list[base.GraphSpec]:
        from toolchain.models import wrappers

        decoder = wrappers.decoder_graph_spec(
            model.model.language_model, model.lm_head, model.config.text_config, axes=3
        )
        return [_vision_spec(model), wrappers.embed_graph_spec(model, model.config.image_token_id), decoder]

    def profiles(
        self, config: configs.Config, folder: Path, settings: dict[str, Any] | None = None
    ) -> dict[str, dict[str, list[list[int]]]]:
        settings, vision = settings or self.host_settings(config, folder), _vision(config)
        image = settings["image"]
        unit = image["patch"] ** 2
        merge = image["merge"] ** 2
        smallest, largest = image["min_pixels"] // unit, image["max_pixels"] // unit
        usual = max(smallest, min(largest, 1024))
        channels = vision["in_channels"] * image["frames"] * unit
        counts = [max(merge, n // merge * merge) for n in (smallest, usual, largest)]
        return {
            "vision": {
                "pixel_values": [[n, channels] for n in counts],
                "position_ids": [[n, 2] for n in counts],
            },
            **decoder_profiles(configs.text_config(config), settings["decoder"], counts[2] // merge, axes=3),
        }


def decoder_settings(text: configs.Config) -> dict[str, Any]:
    """host.json's section about the decoder."""
    return {
        "hidden": text["hidden_size"],
        **base.decoder_lengths(text["max_position_embeddings"]),
        "cache": {
            "layers": text["num_hidden_layers"],
            "kv_heads": text["num_key_value_heads"],
            "head_dim": configs.head_dim(text),
        },
    }


def decoder_profiles(
    text: configs.Config, decoder: dict[str, Any], features: int, axes: int
) -> dict[str, dict[str, list[list[int]]]]:
    """Shapes of `embed` and of `decoder` for batch 1, the decoder twice: one engine with two profiles.

    "decoder" is prefill: chunks of a prompt with any bucket before them, never an empty one; it covers decode too.
    "decoder.decode" is one token a call, with nothing free but the bucket: what a CUDA graph a bucket captures.

    Args:
        decoder: host.json's section, whose buckets and chunk these are the shapes of.
    """
    buckets, chunk, hidden = decoder["past_buckets"], decoder["prefill_chunk"], text["hidden_size"]
    first, last = buckets[0], buckets[-1]
    usual = min(last, 256)
    prefill = (1, first), (min(usual, chunk), first), (chunk, last)
    decode = (1, first), (1, buckets[len(buckets) // 2]), (1, last)
    return {
        "embed": {
            "input_ids": [[1, n] for n in (1, usual, last)],
            "image_features": [[0, hidden], [min(features, usual), hidden], [features, hidden]],
        },
        "decoder": _decoder_shapes(text, prefill, axes),
        "decoder.decode": _decoder_shapes(text, decode, axes),
    }


def _decoder_shapes(text: configs.Config, sizes: tuple[tuple[int, int], ...], axes: int) -> dict[str, list[list[int]]]:
    """Every input's shapes for three (new, past) lengths."""
    past = [[p, 1, text["num_key_value_heads"], configs.head_dim(text)] for _, p in sizes]
    return {
        "inputs_embeds": [[1, n, text["hidden_size"]] for n, _ in sizes],
        "attention_mask": [[1, n + p] for n, p in sizes],
        "position_ids": [[3, 1, n] if axes == 3 else [1, n] for n, _ in sizes],
        **{f"past.{i}.{name}": past for i in range(text["num_hidden_layers"]) for name in ("key", "value")},
    }


def _vision(config: configs.Config) -> configs.Config:
    """vision_config with the defaults that published files leave out."""
    return {
        "in_channels": 3,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "patch_size": 14,
        "mlp_ratio": 4,
    } | config["vision_config"]


def _part(name: str, part: str, kind: str, rows: int, columns: int, order: int, bias: bool) -> LayerSpec:
    full = f"{TOWER}.{name}"
    return LayerSpec(full, part, kind, rows, columns, full, order, bias)


def _tower_permutations(vision: configs.Config, specs: dict[str, LayerSpec]) -> list[FreePermutation]:
    """The tower's residual stream, which the merger reads as neighbours side by side, then v/proj and MLP a block."""
    width, unit = vision["embed_dim"], vision["embed_dim"] // vision["num_heads"]
    neighbours = vision["spatial_merge_size"] ** 2
    readers = [columns_of(f"{TOWER}.merger.mlp.0", neighbours)]
    producers = [*rows_of(specs[f"{TOWER}.patch_embed.proj"]), *norm_of(f"{TOWER}.merger.ln_q", True)]
    inside = []
    for index in range(vision["depth"]):
        block = f"{TOWER}.blocks.{index}"
        qkv, proj, fc1, fc2 = (f"{block}.{x}" for x in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
        readers += [columns_of(qkv), columns_of(fc1)]
        for layer in (proj, fc2):
            producers += rows_of(specs[layer])
        for norm in ("norm1", "norm2"):
            producers += norm_of(f"{block}.{norm}", True)
        # The fused rows are q, k and v; only the last third is free.
        values = rows_of(specs[qkv], start=2 * width)
        inside.append(free_permutation(f"{block}.attn", width, [columns_of(proj)], values, unit))
        inside.append(free_permutation(f"{block}.mlp", specs[fc2].columns, [columns_of(fc2)], rows_of(specs[fc1])))
    return [free_permutation(f"{TOWER}.residual", width, readers, producers), *inside]


def _vision_spec(model: Any) -> base.GraphSpec:
    import torch
    from torch.export import Dim

    from toolchain.device.families.images import grid_position_ids
    from toolchain.plan.images import ImagePlan

    module = vision_module(model)
    vision = model.config.vision_config
    plan = ImagePlan(0, 0, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    ids = torch.from_numpy(grid_position_ids(4, 6, plan))
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(24, channels, generator=torch.Generator().manual_seed(0))
    merge = vision.spatial_merge_size**2
    patches = merge * Dim("merged")
    taps = tuple(f"vision.blocks.{i}" for i in range(vision.depth))
    names = ("pixel_values", "position_ids")
    return base.GraphSpec(
        "vision", module, (pixels, ids), names, ("image_features", *taps), ({0: patches}, {0: patches}), taps
    )


def vision_module(model: Any) -> torch.nn.Module:
    """The tower for one image a call: patches [N, channels], (row, column) ids int64[N, 2] → features, block outputs.

    transformers' own forward splits attention by Python lengths and does not trace; one image needs no split.
    """
    import torch
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    from toolchain.models.wrappers import attention as written_out

    class Qwen2VLVisionGraph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = model.model.visual

        def forward(
            self, pixel_values: torch.Tensor, position_ids: torch.Tensor
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            hidden = self.visual.patch_embed(pixel_values)
            cos, sin = self.visual.rotary_pos_emb(hidden, position_ids)
            taps = []
            for block in self.visual.blocks:
                attention = block.attn
                qkv = attention.qkv(block.norm1(hidden)).reshape(-1, 3, attention.num_heads, attention.head_dim)
                query, key, value = qkv.unbind(1)
                query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
                query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
                mixed = written_out(query, (key,), (value,), None, attention.head_dim**-0.5)
                hidden = hidden + attention.proj(mixed.reshape(-1, attention.dim))
                hidden = hidden + block.mlp(block.norm2(hidden))
                taps.append(hidden)
            return self.visual.merger(hidden), taps

    return Qwen2VLVisionGraph().eval()
