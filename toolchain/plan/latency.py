"""How long an image and an answer take, before anything is built: bytes, FLOPs and launches by phase.

    time = bytes read / read bandwidth + FLOPs / (FP16 peak · matmul efficiency) + layers · 80,000 clocks

Bandwidth, peak and matmul efficiency are the target's, each with its source. The launch cost is the one number fitted
here: 80,000 GPU clocks a layer bring the ten INT4 decode rows of TensorRT Edge-LLM 0.9.0 on Orin within 10 % (Orin
Nano's at the clocks of its 15 W mode, which those rows seem to be from). Rows not fitted to, predicted and published:
INT4 decode on Thor 4B +3 %, 8B -1 % in tokens/s; a W4 2B on Orin Nano in MAXN_SUPER 56 against 60 tokens/s; prefill of
an 8B, 8 prompts of 2,100 tokens, +10 % on AGX Orin and +4 % on Thor; vision of a 2B on three Orins 10 to 13 % too slow.
A test holds these. The model takes our kernels to reach what those INT4 kernels reach; nothing was measured on a board.
A group whose inputs are rotated adds the rotation's product, its reading and writing, and a launch, to its phases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.plan.geometry import ModelGeometry, image_work
from toolchain.plan.memory import Workload
from toolchain.plan.target import Target
from toolchain.values import BitPlan, LayerPlan

LAUNCH_CLOCKS_PER_LAYER = 80_000
# A launch of 3 to 5 microseconds at about 1 GHz, recalled, not measured: a layer above is some twenty launches.
LAUNCH_CLOCKS_PER_ROTATION = 4_000
# Half-widths of the error bars, as shares: above the worst row for each phase, vision having the fewest rows.
ERROR = {"vision": 0.25, "prefill": 0.20, "decode": 0.15}


@dataclass(frozen=True)
class Work:
    """What a phase reads and writes, computes, and how many decoder or tower layers and rotations it launches."""

    bytes_read: int
    flops: int
    layers: int
    rotations: int = 0


@dataclass(frozen=True)
class Phase:
    """One phase: what it reads and computes, and the milliseconds that follow. Decode is per token."""

    name: str
    bytes_read: int
    flops: int
    layers: int
    ms: float
    error: float
    rotations: int = 0

    @property
    def low_ms(self) -> float:
        return self.ms * (1 - self.error)

    @property
    def high_ms(self) -> float:
        return self.ms * (1 + self.error)


@dataclass(frozen=True)
class LatencyPlan:
    target: str
    power_mode: str
    phases: tuple[Phase, ...]

    def phase(self, name: str) -> Phase:
        return next(x for x in self.phases if x.name == name)

    @property
    def tokens_per_s(self) -> float:
        return 1000 / self.phase("decode").ms

    def to_json(self) -> dict[str, Any]:
        phases = [dataclasses.asdict(x) | {"low_ms": x.low_ms, "high_ms": x.high_ms} for x in self.phases]
        return {
            "target": self.target,
            "power_mode": self.power_mode,
            "phases": phases,
            "tokens_per_s": self.tokens_per_s,
            "measured": False,
        }


def plan_latency(plan: BitPlan, geometry: ModelGeometry, target: Target, workload: Workload) -> LatencyPlan:
    """Vision (left out without an image), prefill of the whole prompt, and one decoded token at full context."""
    image = image_work(geometry, *workload.image, workload.max_pixels) if workload.image else None
    prefill = min(workload.context_tokens, (image.tokens if image else 0) + workload.prompt_tokens)
    language = decode_weight_bytes(plan, geometry)
    phases = []
    if image:
        patches = image.sequences * image.patches
        flops = 2 * geometry.vision_weights * patches
        flops += 4 * geometry.vision_layers * geometry.vision_embed * image.patches * patches
        work = Work(vision_weight_bytes(plan, geometry), flops, geometry.vision_layers)
        work = with_rotations(work, plan, {"vision": patches, "projector": image.tokens})
        phases.append(_phase("vision", work, target))
    width = geometry.query_heads * geometry.head_dim
    batch, head = workload.batch, geometry.vocab * geometry.hidden
    flops = batch * (2 * geometry.language_weights * prefill + 2 * geometry.layers * width * prefill**2 + 2 * head)
    work = with_rotations(Work(language, flops, geometry.layers), plan, {"language": batch * prefill})
    phases.append(_phase("prefill", work, target))
    flops = batch * (2 * (geometry.language_weights + head) + 4 * geometry.layers * width * workload.context_tokens)
    kv = batch * geometry.kv_bytes_per_token * workload.context_tokens
    work = with_rotations(Work(language + kv, flops, geometry.layers), plan, {"language": batch})
    phases.append(_phase("decode", work, target))
    return LatencyPlan(target.name, target.power_mode, tuple(phases))


def with_rotations(work: Work, plan: BitPlan, tokens: Mapping[str, int]) -> Work:
    """The work with what rotating inputs adds: of each rotated group once, n inputs of two bytes read and written, and
    2 · n · block FLOPs, a token.

    Args:
        tokens: part → how many tokens go through its layers in this phase; other parts do not run in it.
    """
    groups = {x.group: (x.columns, x.rotation, tokens[x.part]) for x in plan.layers if x.rotation and x.part in tokens}
    return Work(
        work.bytes_read + sum(4 * columns * count for columns, _, count in groups.values()),
        work.flops + sum(2 * columns * block * count for columns, block, count in groups.values()),
        work.layers,
        work.rotations + len(groups),
    )


def _phase(name: str, work: Work, target: Target) -> Phase:
    return Phase(name, **vars(work), ms=phase_ms(name, work, target), error=ERROR[name])


def phase_ms(name: str, work: Work, target: Target) -> float:
    """Milliseconds of one phase. In decode the matrices are thin and their FLOPs hide behind the reads."""
    reading = work.bytes_read / target.bandwidth_read_bytes_per_s
    computing = work.flops / (target.fp16_flops_per_s * target.matmul_efficiency)
    busy = max(reading, computing) if name == "decode" else reading + computing
    clocks = work.layers * LAUNCH_CLOCKS_PER_LAYER + work.rotations * LAUNCH_CLOCKS_PER_ROTATION
    return 1000 * (busy + clocks / target.gpu_clock_hz)


def decode_weight_bytes(plan: BitPlan, geometry: ModelGeometry) -> int:
    """Weight bytes one decoded token reads: decoder and LM head (the embedding's when tied), their kept tensors."""
    layers = sum(_read_bytes(x) for x in plan.layers if x.part in ("language", "head"))
    skipped = geometry.vision_prefixes
    if not geometry.tied_head and geometry.embedding_name:
        skipped += (geometry.embedding_name,)
    return layers + 2 * sum(count for name, count in plan.kept.items() if not name.startswith(skipped))


def vision_weight_bytes(plan: BitPlan, geometry: ModelGeometry) -> int:
    """Weight bytes one image reads: tower and projector."""
    layers = sum(_read_bytes(x) for x in plan.layers if x.part in ("vision", "projector"))
    return layers + 2 * sum(count for name, count in plan.kept.items() if name.startswith(geometry.vision_prefixes))


def _read_bytes(layer: LayerPlan) -> int:
    """Codes and scales a layer reads; a tied layer reads those of the other name."""
    return sum(piece.vq_code.codes_bytes(piece.rows, piece.columns) + 2 * piece.rows for piece in layer.pieces)
