"""InternVL (2.5 and 3 as transformers has them): InternViT over square tiles, pixel shuffle, projector, any decoder.

Tower and decoder come from the generic transformers class; the decoder is Llama-shaped (Qwen2, Llama).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import UnsupportedError
from toolchain.models import configs
from toolchain.models import family as base
from toolchain.models.permutations import (
    FreePermutation,
    Place,
    columns_of,
    decoder_permutations,
    free_permutation,
    norm_of,
    rows_of,
)
from toolchain.models.qwen2_vl import decoder_profiles, decoder_settings
from toolchain.plan.images import CLIP_MEAN, CLIP_STD
from toolchain.values import LayerSpec

if TYPE_CHECKING:
    import torch

    from toolchain.plan.geometry import ModelGeometry

TOWER = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
DECODER = "model.language_model"
DECODER_TYPES = {"qwen2": True, "llama": False}  # does q/k/v carry biases


class InternVL(base.Family):
    name = "internvl"
    model_types = ("internvl",)

    def layers(self, config: configs.Config) -> tuple[LayerSpec, ...]:
        text, vision = configs.text_config(config), config["vision_config"]
        biases = _decoder_biases(text)
        width, inner, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
        embedding, head = base.embedding_and_head(
            text, config, f"{DECODER}.embed_tokens", "lm_head", depth + 3 + text["num_hidden_layers"]
        )
        patch = vision.get("num_channels", 3) * _side(vision["patch_size"]) ** 2
        specs = [embedding, _tower("embeddings.patch_embeddings.projection", "conv", width, patch, None, 1, True)]
        for i in range(depth):
            block, attention_bias = f"encoder.layer.{i}", bool(vision.get("attention_bias", False))
            for name in ("q_proj", "k_proj", "v_proj"):
                group = f"{block}.attention.qkv"
                specs.append(_tower(f"{block}.attention.{name}", "linear", width, width, group, 2 + i, attention_bias))
            specs.append(_tower(f"{block}.attention.projection_layer", "linear", width, width, None, 2 + i, True))
            specs.append(_tower(f"{block}.mlp.fc1", "linear", inner, width, None, 2 + i, True))
            specs.append(_tower(f"{block}.mlp.fc2", "linear", width, inner, None, 2 + i, True))
        shuffled = int(width / config.get("downsample_ratio", 0.5) ** 2)
        hidden = text["hidden_size"]
        for name, columns in (("linear_1", shuffled), ("linear_2", hidden)):
            full = f"{PROJECTOR}.{name}"
            specs.append(LayerSpec(full, "projector", "linear", hidden, columns, full, depth + 2, True))
        return (*specs, *base.decoder_layers(text, DECODER, depth + 3, biases), head)

    def free_permutations(self, config: configs.Config) -> tuple[FreePermutation, ...]:
        specs = {spec.name: spec for spec in self.layers(config)}
        first, last = f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"
        hidden = free_permutation(PROJECTOR, specs[last].columns, [columns_of(last)], rows_of(specs[first]))
        text, embedding = configs.text_config(config), f"{DECODER}.embed_tokens"
        decoder = decoder_permutations(text, specs, DECODER, embedding, "lm_head", feeder=last)
        return (*_tower_permutations(config["vision_config"], specs), hidden, *decoder)

    def geometry(self, config: configs.Config) -> ModelGeometry:
        from toolchain.plan.geometry import internvl_geometry

        return internvl_geometry(config)

    def host_settings(self, config: configs.Config, folder: Path) -> dict[str, Any]:
        image, text = configs.image_settings(folder), configs.text_config(config)
        crop = image.get("crop_to_patches", False)
        stops = configs.stop_ids(config, folder)
        pad = text.get("pad_token_id", config.get("pad_token_id"))
        return {
            "family": self.name,
            "image": {
                "tile": _side(config["vision_config"]["image_size"]),
                "min_tiles": image.get("min_patches", 1) if crop else 1,
                "max_tiles": image.get("max_patches", 12) if crop else 1,
                "tokens_per_tile": _tokens_per_tile(config),
                "mean": list(image.get("image_mean", CLIP_MEAN)),
                "std": list(image.get("image_std", CLIP_STD)),
            },
            "tokens": {
                "image": "<IMG_CONTEXT>",
                "image_start": "<img>",
                "image_end": "</img>",
                "image_id": config["image_token_id"],
                "stop_ids": stops,
                "pad_id": stops[0] if pad is None else pad,
            },
            "decoder": decoder_settings(text),
        }

    def graphs(self, model: Any) -> list[base.GraphSpec]:
        from toolchain.models import wrappers

        decoder = wrappers.decoder_graph_spec(
            model.model.language_model, model.lm_head, model.config.text_config, axes=1
        )
        return [_vision_spec(model), wrappers.embed_graph_spec(model, model.config.image_token_id), decoder]

    def profiles(
        self, config: configs.Config, folder: Path, settings: dict[str, Any] | None = None
    ) -> dict[str, dict[str, list[list[int]]]]:
        settings = settings or self.host_settings(config, folder)
        image, vision = settings["image"], config["vision_config"]
        largest = image["max_tiles"] + (image["max_tiles"] > 1)
        shape = [vision.get("num_channels", 3), image["tile"], image["tile"]]
        features = largest * image["tokens_per_tile"]
        return {
            "vision": {"pixel_values": [[n, *shape] for n in (1, min(2, largest), largest)]},
            **decoder_profiles(configs.text_config(config), settings["decoder"], features, axes=1),
        }


def _decoder_biases(text: configs.Config) -> bool:
    found = text.get("model_type")
    if found not in DECODER_TYPES:
        raise UnsupportedError(
            f"config.json: text_config.model_type {found!r} is not supported inside InternVL; expected one of "
            f"{sorted(DECODER_TYPES)}"
        )
    return DECODER_TYPES[found]


def _side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _tokens_per_tile(config: configs.Config) -> int:
    vision = config["vision_config"]
    patches = _side(vision["image_size"]) // _side(vision["patch_size"])
    return int(patches * config.get("downsample_ratio", 0.5)) ** 2


def _tower(name: str, kind: str, rows: int, columns: int, group: str | None, order: int, bias: bool) -> LayerSpec:
    return LayerSpec(f"{TOWER}.{name}", "vision", kind, rows, columns, f"{TOWER}.{group or name}", order, bias)


def _tower_permutations(vision: configs.Config, specs: dict[str, LayerSpec]) -> list[FreePermutation]:
    """The tower's residual stream, which the projector reads as neighbours side by side, then v and MLP a block."""
    width, unit = vision["hidden_size"], vision["hidden_size"] // vision["num_attention_heads"]
    neighbours = specs[f"{PROJECTOR}.linear_1"].columns // width
    norm_has_bias = vision.get("norm_type", "layer_norm") == "layer_norm"
    readers = [columns_of(f"{PROJECTOR}.linear_1", neighbours)]
    producers = [*_stream_places(vision, specs), *norm_of(f"{PROJECTOR}.layer_norm", True, neighbours)]
    inside = []
    for index in range(vision["num_hidden_layers"]):
        block = f"{TOWER}.encoder.layer.{index}"
        attention, fc1, fc2 = f"{block}.attention", f"{block}.mlp.fc1", f"{block}.mlp.fc2"
        proj = f"{attention}.projection_layer"
        readers += [columns_of(layer) for layer in (*(f"{attention}.{x}_proj" for x in "qkv"), fc1)]
        producers += [*rows_of(specs[proj]), *rows_of(specs[fc2])]
        producers += [Place(f"{block}.lambda_1", 0), Place(f"{block}.lambda_2", 0)]
        for norm in ("layernorm_before", "layernorm_after"):
            producers += norm_of(f"{block}.{norm}", norm_has_bias)
        values = rows_of(specs[f"{attention}.v_proj"])
        inside.append(free_permutation(attention, width, [columns_of(proj)], values, unit))
        inside.append(free_permutation(f"{block}.mlp", specs[fc2].columns, [columns_of(fc2)], rows_of(specs[fc1])))
    return [free_permutation(f"{TOWER}.residual", width, readers, producers), *inside]


def _stream_places(vision: configs.Config, specs: dict[str, LayerSpec]) -> list[Place]:
    """What starts and ends the tower's residual stream; which of it exists is the config's choice."""
    embeddings = f"{TOWER}.embeddings"
    places = [*rows_of(specs[f"{embeddings}.patch_embeddings.projection"]), Place(f"{embeddings}.cls_token", 2)]
    if vision.get("use_absolute_position_embeddings", True):
        places.append(Place(f"{embeddings}.position_embeddings", 2))
    if vision.get("use_mask_token", False):
        places.append(Place(f"{embeddings}.mask_token", 2))
    if not vision.get("use_mean_pooling", True):
        places += norm_of(f"{TOWER}.layernorm", True)
    return places


def _vision_spec(model: Any) -> base.GraphSpec:
    import torch
    from torch.export import Dim

    vision = model.config.vision_config
    side = _side(vision.image_size)
    pixels = torch.randn(2, vision.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    taps = tuple(f"vision.blocks.{i}" for i in range(vision.num_hidden_layers))
    outputs = ("image_features", *taps)
    return base.GraphSpec(
        "vision", vision_module(model), (pixels,), ("pixel_values",), outputs, ({0: Dim("tiles")},), taps
    )


def vision_module(model: Any) -> torch.nn.Module:
    """Tiles float32[T, 3, side, side] → features [T * tokens, hidden] and every block's output [T, 1 + patches, width].

    Raises:
        UnsupportedError: the checkpoint takes its features from another layer than the last, or keeps the class token.
    """
    import torch

    from toolchain.models.wrappers import written_out_attention

    if model.config.vision_feature_layer != -1 or model.config.vision_feature_select_strategy != "default":
        raise UnsupportedError(
            "config.json: expected vision_feature_layer -1 and vision_feature_select_strategy 'default', found "
            f"{model.config.vision_feature_layer} and {model.config.vision_feature_select_strategy!r}"
        )

    class InternVLVisionGraph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.model

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            tower = self.inner.vision_tower
            hidden = tower.embeddings(pixel_values)
            taps = []
            with written_out_attention(tower.config):
                for layer in tower.encoder.layer:
                    hidden = layer(hidden)
                    taps.append(hidden)
            patches = tower.layernorm(hidden)[:, 1:]
            side = int(patches.shape[1] ** 0.5)
            grid = patches.reshape(patches.shape[0], side, side, -1)
            shuffled = self.inner.pixel_shuffle(grid, scale_factor=self.inner.config.downsample_ratio)
            return self.inner.multi_modal_projector(shuffled.flatten(1, 2)).flatten(0, 1), taps

    return InternVLVisionGraph().eval()
