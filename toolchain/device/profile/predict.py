"""What the latency model says of the question that was measured, from what a bundle carries.

A bundle has no config.json; sizes are read back from its bit plan (every layer's rows, columns and part) and from
host.json (the decoder's keys and values, the image's patches).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from toolchain.plan.geometry import ModelGeometry
from toolchain.plan.latency import LatencyPlan, plan_latency
from toolchain.plan.memory import Workload
from toolchain.plan.target import Target
from toolchain.values import BitPlan, LayerPlan

_BLOCK = re.compile(r"\.(\d+)\.")


def predict(
    plan: BitPlan,
    geometry: ModelGeometry,
    target: Target,
    *,
    prompt_tokens: int,
    image_tokens: int,
    image_size: tuple[int, int] | None,
    max_pixels: int | None,
    decoded: int,
) -> LatencyPlan:
    """Vision, prefill and decode of one question on `target`; decode at the mean context of the `decoded` tokens.

    Args:
        prompt_tokens: all of the prompt's, images included; `image_tokens` of them are an image's.
        max_pixels: what the host makes larger images smaller to; None where it has no such limit.
    """
    context = prompt_tokens + decoded // 2
    workload = Workload(
        context_tokens=max(context, 1),
        image=image_size,
        max_pixels=max_pixels or target.max_image_pixels,
        prompt_tokens=prompt_tokens - image_tokens,
    )
    return plan_latency(plan, geometry, target, workload)


def geometry_from_plan(plan: BitPlan, host_settings: Mapping[str, Any]) -> ModelGeometry:
    """The sizes that latency follows from; head counts of the tower are not known (1), its other sizes are.

    Args:
        host_settings: host.json.

    Raises:
        KeyError, StopIteration: the plan has no decoder layers, no embedding, or host.json lacks a section.
    """
    cache, image = host_settings["decoder"]["cache"], host_settings["image"]
    hidden, layers = host_settings["decoder"]["hidden"], cache["layers"]
    language = [x for x in plan.layers if x.part == "language"]
    embedding = next(x for x in plan.layers if x.kind == "embedding")
    keys = cache["kv_heads"] * cache["head_dim"]
    queries = _query_width(language, keys, hidden)
    mlp = _weights(language) // layers - hidden * (2 * queries + 2 * keys)
    vision = [x for x in plan.layers if x.part == "vision" and _BLOCK.search(x.name)]
    tower = _tower(vision)
    return ModelGeometry(
        name=host_settings.get("family", "?"),
        layers=layers,
        hidden=hidden,
        intermediate=mlp // (3 * hidden),
        query_heads=queries // cache["head_dim"],
        kv_heads=cache["kv_heads"],
        head_dim=cache["head_dim"],
        vocab=embedding.rows,
        tied_head=all(x.tied_to for x in plan.layers if x.part == "head"),
        **tower,
        vision_heads=1,
        **_image_units(image),
        vision_prefixes=_prefixes(plan),
        embedding_name=embedding.name,
    )


def _tower(vision: list[LayerPlan]) -> dict[str, int]:
    if not vision:
        return {"vision_layers": 0, "vision_embed": 0, "vision_intermediate": 0}
    blocks = len({_BLOCK.search(x.name).group(1) for x in vision})  # type: ignore[union-attr]
    embed = Counter(x.columns for x in vision).most_common(1)[0][0]
    # Two matrices between the embedding and the inner size; attention has four of embed x embed.
    inner = (_weights(vision) // blocks - 4 * embed * embed) // (2 * embed)
    return {"vision_layers": blocks, "vision_embed": embed, "vision_intermediate": inner}


def _query_width(language: list[LayerPlan], keys: int, hidden: int) -> int:
    """Rows of the queries: of a group whose other two members are as wide as the keys and values; else `hidden`."""
    groups: dict[str, list[int]] = {}
    for layer in language:
        groups.setdefault(layer.group, []).append(layer.rows)
    for rows in groups.values():
        rest = sorted(rows)
        if len(rest) == 3 and rest[0] == rest[1] == keys:
            return rest[2]
    return hidden


def _image_units(image: Mapping[str, Any]) -> dict[str, int]:
    """Patches of any resolution, or square tiles whose tokens are counted in host.json: one patch a token is enough."""
    if "tile" not in image:
        return {"patch": image["patch"], "merge": image["merge"]}
    side = round(image["tokens_per_tile"] ** 0.5)
    merge = 2
    return {
        "patch": image["tile"] // (side * merge),
        "merge": merge,
        "tile_size": image["tile"],
        "max_tiles": image["max_tiles"],
    }


def _prefixes(plan: BitPlan) -> tuple[str, ...]:
    """Beginnings of the tower's and projector's names, which a decoded token does not read."""
    names = [x.name for x in plan.layers if x.part in ("vision", "projector")]
    return tuple(sorted({".".join(name.split(".")[:2]) + "." for name in names}, reverse=True))


def _weights(layers: list[LayerPlan]) -> int:
    return sum(x.rows * x.columns for x in layers)
