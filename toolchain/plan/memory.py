"""What a model takes of a board's memory, before anything is built; and what to turn down when it does not fit.

Where the figures come from (all published rows: TensorRT Edge-LLM 0.9.0 performance page, JetPack 7.2, INT4):

    weights, tables, kept    counted from the bit plan, byte for byte
    kv                       layers · 2 · kv heads · head size · 2 bytes · context · batch; Qwen3-0.6B, 2200: 241 MiB
    activations              float32 residual and its normed copy, float16 for the widest matrices, attention scores
    vision activations       66 bytes a patch and channel: three Qwen3-VL engines differ by 63 to 68 between 2,048 and
                             16,384 visual tokens; attention scores on top, because ours is not fused: of one tile of
                             queries, as the rewrite cuts them (SCORES_BYTES)
    runtime overhead         0.80 GiB + 0.131 bytes a decoder weight: fits Qwen3-0.6B/1.7B/4B/8B on Orin NX within 3 %
    build peak               constants of the engine four times over (reports run from three to four); weights that are
                             graph inputs never reach the builder
Totals for Qwen3-VL 2B, 4B and 8B on Orin NX come out 4 to 6 % above the published figure; only the vision constant was
taken from the same models (from differences between their rows, not from these totals). Nothing here was measured on a
board by us.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from toolchain.errors import UsageError
from toolchain.plan.geometry import ImageWork, ModelGeometry, image_work
from toolchain.plan.target import Target
from toolchain.values import BitPlan

OVERHEAD_BYTES = int(0.80 * 2**30)
OVERHEAD_BYTES_PER_WEIGHT = 0.131
VISION_BYTES_PER_CHANNEL = 66
BUILD_COPIES = 4
SCORE_COPIES = 2  # scores and their softmax are alive together
# The rewrite cuts the queries of a vision attention into tiles where the largest image's scores, in float32, exceed
# this. One layer of Qwen2-VL's tower has 604 MB of them on its largest image in 768 tokens; a tenth stays below what
# an 8 GB board gives in one block without a kernel argument (256 MiB), and fills its GPU still.
SCORES_BYTES = 64 << 20
MOST_TILES = 64  # a tile is five nodes a layer; beyond this a smaller largest image serves better
PROMPT_TOKENS = 256

WEIGHT_PARTS = {
    "weights.language": ("language",),
    "weights.vision": ("vision",),
    "weights.projector": ("projector",),
    "weights.embedding_head": ("embedding", "head"),
}


@dataclass(frozen=True)
class Workload:
    """What is asked of the model: tokens of context per sequence, one image per sequence (width, height), sequences.

    Images above `max_pixels` are made smaller by the host. `prompt_tokens` is the longest text prompt, no answer.
    `fused_attention` holds where a kernel never stores scores whole; the graphs of today decompose attention.
    """

    context_tokens: int
    image: tuple[int, int] | None
    max_pixels: int
    batch: int = 1
    prompt_tokens: int = PROMPT_TOKENS
    fused_attention: bool = False

    def __post_init__(self) -> None:
        if min(self.context_tokens, self.batch, self.max_pixels) < 1 or self.prompt_tokens < 0:
            raise UsageError(f"expected a context, batch and pixel limit of at least 1, found {self}")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at run time. `problems` says in a sentence each why it does not fit; empty means it does."""

    target: str
    workload: Workload
    image: ImageWork | None
    parts: dict[str, int]
    build_peak_bytes: int
    largest_block: tuple[str, int]
    usable_bytes: int
    problems: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def largest_block_bytes(self) -> int:
        return self.largest_block[1]

    @property
    def fits(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The `mgvq plan` document, advice excluded; parts add up to peak_bytes."""
        weights = {key.removeprefix("weights."): self.parts[key] for key in WEIGHT_PARTS}
        others = {key: value for key, value in self.parts.items() if key not in WEIGHT_PARTS}
        return {
            "target": self.target,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "build_peak_bytes": self.build_peak_bytes,
            "largest_block_bytes": self.largest_block_bytes,
            "largest_block": self.largest_block[0],
            "usable_bytes": self.usable_bytes,
            "parts": {"weights": sum(weights.values()), **others},
            "weights_by_part": weights,
            "workload": dataclasses.asdict(self.workload),
            "image": dataclasses.asdict(self.image) if self.image else None,
            "problems": list(self.problems),
        }


def default_workload(
    target: Target, image: tuple[int, int] | None = None, context_tokens: int | None = None
) -> Workload:
    """The target's own context and pixel limit; without an image, the largest square one it lets through."""
    side = int(target.max_image_pixels**0.5)
    return Workload(context_tokens or target.default_context_tokens, image or (side, side), target.max_image_pixels)


def plan_memory(plan: BitPlan, geometry: ModelGeometry, target: Target, workload: Workload) -> MemoryPlan:
    """The memory plan of one model in one format on one board.

    Raises:
        InputDataError: the image's sides are impossible.
    """
    image = image_work(geometry, *workload.image, workload.max_pixels) if workload.image else None
    tokens = image.tokens if image else 0
    prefill = min(workload.context_tokens, tokens + workload.prompt_tokens)
    parts = _weight_bytes(plan)
    parts["kv"] = geometry.kv_bytes_per_token * workload.context_tokens * workload.batch
    parts["activations"] = _decoder_activations(geometry, prefill, workload)
    parts["activations"] += rotated_bytes(plan, ("language",)) * prefill * workload.batch
    parts["vision_activations"] = _vision_activations(geometry, image, workload)
    if image:
        parts["vision_activations"] += rotated_bytes(plan, ("vision",)) * image.patches * image.sequences
    parts["runtime_overhead"] = OVERHEAD_BYTES + int(OVERHEAD_BYTES_PER_WEIGHT * geometry.language_weights)
    parts["plugin_workspace"] = _plugin_workspace(target)
    arena = max(parts["activations"], parts["vision_activations"])
    build_peak = (
        parts["runtime_overhead"]
        + BUILD_COPIES * (parts["kept16"] + parts["tables"])
        + arena
        + parts["plugin_workspace"]
    ) + _largest_group(plan)[1]
    block = max(_blocks(plan, geometry, parts, workload), key=lambda item: item[1])
    problems = _problems(sum(parts.values()), build_peak, block, target)
    if tokens >= workload.context_tokens:
        problems += (f"the image's {tokens} tokens leave no room in a context of {workload.context_tokens}",)
    return MemoryPlan(target.name, workload, image, parts, build_peak, block, target.memory_usable_bytes, problems)


def _weight_bytes(plan: BitPlan) -> dict[str, int]:
    """Codes and scales by part, tables once each, kept tensors at two bytes an element."""
    stored: defaultdict[str, int] = defaultdict(int)
    for layer in plan.layers:
        stored[layer.part] += layer.codes_bytes + layer.scales_bytes
    result = {key: sum(stored[part] for part in names) for key, names in WEIGHT_PARTS.items()}
    result["tables"] = sum(code.codebook_bytes for code in plan.codebooks().values())
    result["kept16"] = 2 * sum(plan.kept.values())
    return result


def _decoder_activations(geometry: ModelGeometry, prefill: int, workload: Workload) -> int:
    queries, keys = geometry.query_heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    widest = max(2 * queries + 2 * keys, 3 * geometry.intermediate)
    scores = 0 if workload.fused_attention else SCORE_COPIES * 2 * geometry.query_heads * prefill * prefill
    return workload.batch * (prefill * (2 * 4 * geometry.hidden + 2 * widest) + scores + 4 * geometry.vocab)


def rotated_bytes(plan: BitPlan, parts: tuple[str, ...]) -> int:
    """Bytes a token of the widest inputs that are rotated: a second copy of them in float16, of one layer at a time."""
    return max((2 * x.columns for x in plan.layers if x.rotation and x.part in parts), default=0)


def _vision_activations(geometry: ModelGeometry, image: ImageWork | None, workload: Workload) -> int:
    """One image a call, so `batch` does not enter, but for the features it leaves behind (float16)."""
    if image is None:
        return 0
    tower = image.sequences * VISION_BYTES_PER_CHANNEL * geometry.vision_embed * image.patches
    scores = 0 if workload.fused_attention else SCORE_COPIES * 2 * tile_scores(geometry, image)
    return tower + scores + workload.batch * 2 * image.tokens * geometry.hidden


def tile_scores(geometry: ModelGeometry, image: ImageWork) -> int:
    """Elements of the largest score tensor of the tower: all queries at once, or the most that a tile can have.

    A bound, not a count: with T tiles a tile has ceil(n / T) of n queries, which falls when T rises by one, so that a
    larger image could take a little less than a smaller one. T is the least with n / T queries below the limit, so
    that a tile exceeds the limit by less than one query's scores; and T ends at MOST_TILES.
    """
    query = image.sequences * geometry.vision_heads * image.patches  # scores of one query of every head and sequence
    limited = SCORES_BYTES // 4 + query
    return min(query * image.patches, max(limited, query * -(-image.patches // MOST_TILES)))


def _plugin_workspace(target: Target) -> int:
    """Partial sums of a persistent kernel: two blocks an SM, one 128x16 float32 tile each, and 1 MiB of flags."""
    return 2 * target.sm_count * 128 * 16 * 4 + 2**20


def _largest_group(plan: BitPlan) -> tuple[str, int]:
    """Layers of a group run as one node, so their codes are one tensor; one a K-segment where they have those."""
    sizes: defaultdict[tuple[str, int], int] = defaultdict(int)
    for layer in plan.layers:
        for number, piece in enumerate(layer.pieces):
            sizes[layer.group, number] += piece.codes_bytes
    return max(
        ((f"codes of {group}", size) for (group, _), size in sizes.items()), key=lambda x: x[1], default=("codes", 0)
    )


def _blocks(plan: BitPlan, geometry: ModelGeometry, parts: dict[str, int], workload: Workload) -> list[tuple[str, int]]:
    """Single allocations by name. An engine's activations are one arena; keys and values are one buffer a layer."""
    return [
        _largest_group(plan),
        *((f"kept {name}", 2 * count) for name, count in plan.kept.items()),
        ("keys or values of one layer", parts["kv"] // (2 * geometry.layers)),
        ("logits", 4 * geometry.vocab * workload.batch),
        ("activations of the decoder", parts["activations"]),
        ("activations of the vision tower", parts["vision_activations"]),
    ]


def _problems(peak: int, build_peak: int, block: tuple[str, int], target: Target) -> tuple[str, ...]:
    found = []
    if peak > target.memory_usable_bytes:
        found.append(f"running takes {mib(peak)}, {target.title} has {mib(target.memory_usable_bytes)} to give")
    if build_peak > target.memory_usable_bytes:
        found.append(f"building takes {mib(build_peak)}, {target.title} has {mib(target.memory_usable_bytes)} to give")
    if block[1] > target.largest_block_bytes:
        limit = mib(target.largest_block_bytes)
        found.append(
            f"{block[0]} want one block of {mib(block[1])}, the largest to be had on {target.title} is {limit}"
        )
    return tuple(found)


def mib(size: int) -> str:
    """ "1,234 MiB"."""
    return f"{size / 2**20:,.0f} MiB"
