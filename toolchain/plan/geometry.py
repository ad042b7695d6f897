"""The sizes of a vision-language model that memory and latency follow from, and what one image costs it.

No torch. Family files build a `ModelGeometry` from config.json; the readers for the two layouts in use
(patches of any resolution, fixed tiles) are here because both are plain key look-ups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolchain.errors import InputDataError
from toolchain.plan.images import ImagePlan, resized_shape

MIN_PIXELS = 56 * 56  # Qwen2-VL's stock lower limit


@dataclass(frozen=True)
class ModelGeometry:
    """A decoder with grouped keys and values, and a vision tower.

    With `tile_size` 0 images of any size become patches (Qwen2-VL); otherwise an image becomes up to `max_tiles`
    squares of `tile_size` pixels plus a thumbnail (InternVL); how many a checkpoint allows stands in its processor, not
    in its config. `merge` patches a side become one visual token. Name prefixes say what a decoded token does not read.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_head: bool
    vision_layers: int
    vision_embed: int
    vision_intermediate: int
    vision_heads: int
    patch: int
    merge: int
    tile_size: int = 0
    max_tiles: int = 12
    vision_prefixes: tuple[str, ...] = ()
    embedding_name: str = ""

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, float16."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2

    @property
    def language_weights(self) -> int:
        """Weights in the decoder's linears."""
        queries, keys = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate)

    @property
    def vision_weights(self) -> int:
        """Weights in the tower's linears, patch embedding and projector left out (under 5 % of it)."""
        return self.vision_layers * self.vision_embed * (4 * self.vision_embed + 2 * self.vision_intermediate)

    @property
    def image_unit(self) -> int:
        """Image sides are worked in steps of this many pixels."""
        return self.tile_size or self.patch * self.merge


@dataclass(frozen=True)
class ImageWork:
    """One image as the tower sees it: `sequences` of `patches` each in one call, `tokens` visual tokens in all."""

    width: int
    height: int
    sequences: int
    patches: int
    tokens: int


def image_work(geometry: ModelGeometry, width: int, height: int, max_pixels: int) -> ImageWork:
    """What an image of width x height pixels costs; images above `max_pixels` are made smaller first.

    Raises:
        InputDataError: a side is not positive, or the sides differ by more than a factor of 200.
    """
    if min(width, height) < 1 or max(width, height) > 200 * min(width, height):
        raise InputDataError(
            f"image of {width}x{height} pixels: expected sides of at least 1 that differ 200-fold at most"
        )
    if geometry.tile_size:
        return _tile_work(geometry, width, height)
    limits = ImagePlan(MIN_PIXELS, max(max_pixels, MIN_PIXELS), geometry.patch, geometry.merge)
    tall, wide = resized_shape(height, width, limits)
    patches = (tall // geometry.patch) * (wide // geometry.patch)
    return ImageWork(wide, tall, 1, patches, patches // geometry.merge**2)


def _tile_work(geometry: ModelGeometry, width: int, height: int) -> ImageWork:
    """All tiles and the thumbnail go through the tower in one call, each with its class token."""
    from toolchain.plan.images import tile_grid  # loads the tokenizer library: only where tiles are in use

    columns, rows = tile_grid(width, height, geometry.tile_size, 1, geometry.max_tiles)
    sequences = columns * rows + (columns * rows > 1)
    side = geometry.tile_size // geometry.patch
    patches, tokens = side * side + 1, sequences * (side // geometry.merge) ** 2
    return ImageWork(columns * geometry.tile_size, rows * geometry.tile_size, sequences, patches, tokens)


def qwen2_vl_geometry(config: dict[str, Any]) -> ModelGeometry:
    """Geometry of a Qwen2-VL-like config.json, with the text keys nested (transformers 5) or at the top (older).

    Raises:
        InputDataError: a key is missing.
    """
    text, vision = config.get("text_config") or config, _value(config, "vision_config")
    embed = _value(vision, "embed_dim")
    return ModelGeometry(
        **_decoder(config, text),
        vision_layers=_value(vision, "depth"),
        vision_embed=embed,
        vision_intermediate=int(embed * vision.get("mlp_ratio", 4)),
        vision_heads=_value(vision, "num_heads"),
        patch=vision.get("patch_size") or _value(vision, "spatial_patch_size"),
        merge=vision.get("spatial_merge_size", 2),
        vision_prefixes=("model.visual.",),
        embedding_name="model.language_model.embed_tokens",
    )


def internvl_geometry(config: dict[str, Any]) -> ModelGeometry:
    """Geometry of an InternVL-like config.json (transformers' own classes).

    Raises:
        InputDataError: a key is missing.
    """
    text, vision = _value(config, "text_config"), _value(config, "vision_config")
    size, patch = (_first(_value(vision, key)) for key in ("image_size", "patch_size"))
    return ModelGeometry(
        **_decoder(config, text),
        vision_layers=_value(vision, "num_hidden_layers"),
        vision_embed=_value(vision, "hidden_size"),
        vision_intermediate=_value(vision, "intermediate_size"),
        vision_heads=_value(vision, "num_attention_heads"),
        patch=patch,
        merge=round(1 / config.get("downsample_ratio", 0.5)),
        tile_size=size,
        vision_prefixes=("model.vision_tower.", "model.multi_modal_projector."),
        embedding_name="model.language_model.embed_tokens",
    )


def _decoder(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = _value(text, "num_attention_heads"), _value(text, "hidden_size")
    return {
        "name": config.get("model_type", "?"),
        "layers": _value(text, "num_hidden_layers"),
        "hidden": hidden,
        "intermediate": _value(text, "intermediate_size"),
        "query_heads": heads,
        "kv_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim") or hidden // heads,
        "vocab": _value(text, "vocab_size"),
        "tied_head": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    }


def _value(section: dict[str, Any], key: str) -> Any:
    if section.get(key) is None:
        raise InputDataError(
            f"config.json: no {key!r} where it was expected; is the file from a vision-language model?"
        )
    return section[key]


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)
