"""Sizes of published models to time: the groups of layers in one of a decoder's identical blocks, and every matrix.

The groups are the families' own (`models.family.decoder_layers`): layers that read one input are coded together.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from toolchain.errors import UnsupportedError, UsageError
from toolchain.models.family import decoder_layers
from toolchain.values import COLUMN_GROUP, ROW_GROUP, LayerSpec

# What each checkpoint's config.json says of its decoder; "demo" is the model that ships with the package. InternVL2-8B
# is over InternLM2, which stores q, k and v as one matrix: split, it is the same group.
PUBLISHED: dict[str, dict[str, int]] = {
    "demo": {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen2-vl-2b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen2-vl-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "llava-onevision-7b": {  # over Qwen2-7B, as Qwen2-VL-7B is
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "internvl2-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
# Rows of the embedding and of the LM head, by config.json; LLaVA-OneVision's by that of the Qwen2-7B it is over.
VOCABULARIES = {
    "demo": 512,
    "qwen2-vl-2b": 151936,
    "qwen2-vl-7b": 152064,
    "llava-onevision-7b": 152064,
    "internvl2-8b": 92553,
}


@dataclass(frozen=True)
class TowerShape:
    """A vision tower's blocks and what leads from it to the decoder: `merged` is the width of the projector's input."""

    width: int
    inner: int
    patch: int  # numbers of a patch: colours times its pixels (times frames)
    merged: int


# Qwen2-VL: 32 blocks of 1280, patches of 2 frames of 14x14, four patches merged. SigLIP so400m: 27 of 1152, patches of
# 14x14, not merged. InternViT-300M: 24 of 1024, patches of 14x14, four merged.
TOWERS = {
    "qwen2-vl-2b": TowerShape(1280, 5120, 1176, 5120),
    "qwen2-vl-7b": TowerShape(1280, 5120, 1176, 5120),
    "llava-onevision-7b": TowerShape(1152, 4304, 588, 1152),
    "internvl2-8b": TowerShape(1024, 4096, 588, 4096),
}


@dataclass(frozen=True)
class GroupShape:
    """Layers of one block that read the same input: the rows of each, and the columns of all."""

    name: str
    rows: tuple[int, ...]
    columns: int

    @property
    def weights(self) -> int:
        return sum(self.rows) * self.columns

    def limited(self, rows_share: float, columns_share: float) -> GroupShape:
        """The first rows of every layer and the first columns, in whole row and column groups, one at least."""
        rows = tuple(_whole(count, rows_share, ROW_GROUP) for count in self.rows)
        return GroupShape(self.name, rows, _whole(self.columns, columns_share, COLUMN_GROUP))


@dataclass(frozen=True)
class DecoderShape:
    """A decoder of `blocks` identical blocks, and the groups of one of them in the order in which they are coded."""

    name: str
    blocks: int
    groups: tuple[GroupShape, ...]


def decoder_shape(name: str) -> DecoderShape:
    """The decoder of that name.

    Raises:
        UnsupportedError: it is none of PUBLISHED.
    """
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UnsupportedError(f"shapes {name!r} are not known; use one of {', '.join(PUBLISHED)}{hint}")
    config = PUBLISHED[name]
    layers: dict[str, list[LayerSpec]] = {}
    for spec in decoder_layers(config, "decoder", 0, False):
        if spec.order == 0:
            layers.setdefault(group_name(spec), []).append(spec)
    groups = (GroupShape(group, tuple(s.rows for s in found), found[0].columns) for group, found in layers.items())
    return DecoderShape(name, config["num_hidden_layers"], tuple(groups))


def group_name(spec: LayerSpec) -> str:
    """The short name of a decoder layer's group: qkv, o, gate_up or down."""
    return spec.group.rsplit(".", 1)[-1].removesuffix("_proj")


def chosen_groups(shape: DecoderShape, names: tuple[str, ...] | None) -> tuple[GroupShape, ...]:
    """The groups of those names in the block's order; all of them where None.

    Raises:
        UsageError: a name is not one of the block's groups, or none is given.
    """
    known = [group.name for group in shape.groups]
    wanted = known if names is None else list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise UsageError(f"groups {','.join(wanted)!r}: expected some of {','.join(known)}; found {unknown or 'none'}")
    return tuple(group for group in shape.groups if group.name in wanted)


def matrix_shapes(name: str) -> dict[str, tuple[int, int]]:
    """Every kind of matrix of a published model as it runs, name → (rows, columns): the decoder's fused groups, the
    head (and with it the embedding), the tower's linears and the projector's.

    Raises:
        UnsupportedError: the model is not known.
    """
    decoder = decoder_shape(name)
    hidden = decoder.groups[0].columns
    shapes = {group.name: (sum(group.rows), group.columns) for group in decoder.groups}
    shapes["head"] = (VOCABULARIES[name], hidden)
    if name in TOWERS:
        tower = TOWERS[name]
        shapes["vision.patch"] = (tower.width, tower.patch)
        shapes["vision.qkv"] = (3 * tower.width, tower.width)
        shapes["vision.proj"] = (tower.width, tower.width)
        shapes["vision.fc1"] = (tower.inner, tower.width)
        shapes["vision.fc2"] = (tower.width, tower.inner)
        # Qwen2-VL's merger keeps its width in between; the other two go to the decoder's at once.
        between = tower.merged if name.startswith("qwen2-vl") else hidden
        shapes["projector.1"] = (between, tower.merged)
        shapes["projector.2"] = (hidden, between)
    return shapes


def _whole(count: int, share: float, unit: int) -> int:
    if share == 1:
        return count
    return min(count, max(unit, int(count * share) // unit * unit))
