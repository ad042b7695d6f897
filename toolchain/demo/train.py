"""Train the built-in VLM from scratch on the drawn task: `python -m toolchain.demo.train -o FOLDER`.

Question answering alone sits on a long plateau. Dense supervision breaks it: every picture is also read out whole in
raster order; linear heads that are thrown away afterwards name each cell's colour and kind from its vision token, and
its row and column from the decoder's second layer. After 1250 steps looking a cell up by its place worked and by its
content not; so from there on the second layer must also name the content in the words' own embeddings, and from step
1750 on one head of the third must look from a name to what it names. From step 3250 on a name must also know, a layer
later, how many things it found and what and where a single one is; the learning rate starts over there, lower. The
last thousand steps ask mostly what is learned last.

Vision attention is one batched call, since all pictures of a batch share one grid size (see `batches`). `--resume`
continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from toolchain.demo import architecture, task
from toolchain.demo.batches import Batch, make_batch
from toolchain.device.families.images import grid_position_ids
from toolchain.plan.images import ImagePlan

PLACE_LAYER = 1  # decoder layer after which image tokens must know where they stand and what they show
LOOK_LAYER = 2  # decoder layer whose first head must look from a name to what it names
FIND_LAYER = 3  # decoder layer after which a name must know what it found


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. `batch` counts pictures, each with a reading and `questions` questions."""

    steps: int = 6000
    batch: int = 24
    questions: int = 6
    warmup: int = 100
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    reading_weight: float = 0.5
    head_weight: float = 1.0
    naming_weight: float = 0.5
    naming_start: int = 1250
    looking_weight: float = 0.5
    looking_start: int = 1750
    finding_weight: float = 0.25
    finding_start: int = 3250
    first_steps: int = 3400
    restart: int = 3250
    hard_start: int = 4500
    hard_share: float = 0.7
    restart_rate: float = 4e-4


class Heads(torch.nn.Module):
    """Training only: each vision token's colour and kind (0 empty), and where the decoder thinks it stands."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.color = torch.nn.Linear(width, 1 + len(task.COLORS))
        self.kind = torch.nn.Linear(width, 1 + len(task.SHAPES + task.DIGITS))
        self.row = torch.nn.Linear(width, task.ROW_RANGE[1])
        self.column = torch.nn.Linear(width, task.COLUMN_RANGE[1])
        labels = (self.color, self.kind, self.row, self.column)
        sizes = (1 + task.ROW_RANGE[1] * task.COLUMN_RANGE[1], *(head.out_features for head in labels))
        self.found = torch.nn.ModuleList([torch.nn.Linear(width, size) for size in sizes])

    def loss(self, features: torch.Tensor, placed: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Sum of the four mean cross-entropies (nats a cell)."""
        logits = (self.color(features), self.kind(features), self.row(placed), self.column(placed))
        return torch.stack([F.cross_entropy(x.float(), cells[:, i]) for i, x in enumerate(logits)]).sum()

    def finding_loss(self, mentions: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropies (nats a name) of how many things it names and of the one's labels, summed."""
        logits = [head(mentions).float() for head in self.found]
        return torch.stack([F.cross_entropy(x, found[:, i], ignore_index=-100) for i, x in enumerate(logits)]).sum()


@dataclass(frozen=True)
class Losses:
    """Nats: a token over the answers and over the readings; a cell for the heads; naming, looking and finding."""

    answers: torch.Tensor
    reading: torch.Tensor
    heads: torch.Tensor
    naming: torch.Tensor
    looking: torch.Tensor
    finding: torch.Tensor

    def total(self, schedule: Schedule, step: int) -> torch.Tensor:
        loss = self.answers + schedule.reading_weight * self.reading + schedule.head_weight * self.heads
        if step >= schedule.naming_start:
            loss = loss + schedule.naming_weight * self.naming
        if step >= schedule.looking_start:
            loss = loss + schedule.looking_weight * self.looking
        if step >= schedule.finding_start:
            loss = loss + schedule.finding_weight * self.finding
        return loss


def losses(model, heads: Heads, batch: Batch) -> Losses:
    """Everything that is trained on, for one batch."""
    decoder = model.model.language_model
    features = _batched_vision(model.model.visual, batch.patches, batch.grid)
    is_image = batch.ids == model.config.image_token_id
    hidden = decoder.embed_tokens(batch.ids)
    hidden = hidden.masked_scatter(is_image.unsqueeze(-1), features.to(hidden.dtype))
    rotary = decoder.rotary_emb(hidden, batch.positions)
    mask = _block_mask(batch.block)
    for index, layer in enumerate(decoder.layers):
        if index == LOOK_LAYER:
            looking = _looking_loss(layer, hidden, rotary, mask, batch)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if index == PLACE_LAYER:
            placed = hidden[is_image]
        if index == FIND_LAYER:
            finding = heads.finding_loss(hidden[batch.mentions[:, 0], batch.mentions[:, 1]], batch.found)
    is_scored = batch.is_answer[:, 1:]
    logits = model.lm_head(decoder.norm(hidden[:, :-1][is_scored])).float()
    nats = F.cross_entropy(logits, batch.ids[:, 1:][is_scored], reduction="none")
    is_reading = batch.block[:, 1:][is_scored] == 1
    named = model.lm_head(decoder.norm(placed)).float()
    naming = F.cross_entropy(named, batch.words[:, 0]) + F.cross_entropy(named, batch.words[:, 1])
    cells = heads.loss(features, placed, batch.cells)
    return Losses(nats[~is_reading].mean(), nats[is_reading].mean(), cells, naming, looking, finding)


def _looking_loss(layer, hidden: torch.Tensor, rotary, mask: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean of −log(attention that a layer's first head gives from a name to what it names), in nats.

    Names of things that are not in the picture are left out.
    """
    from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half

    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    cos, sin = rotary
    is_there = batch.named.any(1)
    rows, places = batch.mentions[is_there].unbind(1)

    def turned(x: torch.Tensor, at) -> torch.Tensor:
        x = x[..., : attention.head_dim].float()
        return x * cos[at] + rotate_half(x) * sin[at]

    query = turned(attention.q_proj(normed[rows, places]), (rows, places))
    key = turned(attention.k_proj(normed), slice(None))
    logits = torch.einsum("md,msd->ms", query, key[rows]) * attention.head_dim**-0.5 + mask[rows, 0, places]
    return -torch.logsumexp(logits.log_softmax(-1).masked_fill(~batch.named[is_there], -torch.inf), dim=-1).mean()


def _block_mask(block: torch.Tensor) -> torch.Tensor:
    """Additive mask float32[B, 1, S, S]: a token sees what comes before it in the prefix and in its own block."""
    length = block.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same = block[:, :, None] == block[:, None, :]
    allowed = earlier & (same | (block[:, None, :] == 0))
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]


def _batched_vision(visual, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Image features [B * N / 4, hidden]: the tower's own layers, attention batched over pictures of one size."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    count, tokens, _ = patches.shape
    # The patch convolution's stride equals its kernel: as a matrix product it is the same sum, several times faster.
    hidden = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    ids = torch.from_numpy(grid_position_ids(*grid, ImagePlan(0, 0)))
    cos, sin = visual.rotary_pos_emb(hidden, ids)
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).reshape(count, tokens, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(count, tokens, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.reshape(count * tokens, -1))


def learning_rate_at(step: int, schedule: Schedule) -> float:
    """Linear warm-up and a cosine over `first_steps`; from `restart` on a second, lower cosine to the end."""
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    peak, start, end = schedule.learning_rate, schedule.warmup, schedule.first_steps
    if step >= schedule.restart:
        peak, start, end = schedule.restart_rate, schedule.restart, schedule.steps
    progress = min(1.0, (step - start) / max(1, end - start))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def schedule_for(size: str) -> Schedule:
    """The schedule of one of `architecture.SIZES`: what the demo's plateaus asked for late, the larger has at once."""
    if size == "demo":
        return Schedule()
    return Schedule(
        steps=3000, batch=12, learning_rate=8e-4, naming_start=0, looking_start=0, finding_start=0, hard_start=1500,
        first_steps=3000, restart=3000,
    )  # fmt: skip


def train(folder: Path, schedule: Schedule, seed: int, resume: bool, size: str = "demo") -> None:
    """Train and save weights, tokenizer and log into `folder`; a checkpoint every 250 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = architecture.train_tokenizer(seed)
    plan = ImagePlan(min_pixels=architecture.MIN_PIXELS, max_pixels=architecture.MAX_PIXELS)
    model = architecture.build_model(tokenizer, seed, size)
    trained = torch.nn.ModuleDict({"model": model, "heads": Heads(model.config.text_config.hidden_size)})
    optimizer = _optimizer(trained, schedule)
    start, checkpoint = 0, folder / "training.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint)
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began, history = time.monotonic(), []
    with (folder / "training_log.jsonl").open("a" if start else "w") as log:
        for step in range(start, schedule.steps):
            rng = np.random.default_rng([seed, 1, step])
            hard_share = schedule.hard_share if step >= schedule.hard_start else 0.0
            batch = make_batch(rng, tokenizer, plan, schedule.batch, schedule.questions, hard_share)
            history.append(_train_step(trained, optimizer, batch, step, schedule))
            if (step + 1) % 50 == 0:
                names = ("answers", "reading", "heads", "naming", "looking", "finding")
                means = dict(zip(names, np.mean(history[-50:], axis=0).round(4).tolist()))
                line = {"step": step + 1, **means, "seconds": round(time.monotonic() - began)}
                print(json.dumps(line), file=log, flush=True)
            if (step + 1) % 250 == 0:
                state = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").rename(checkpoint)
    model.to(torch.float16).save_pretrained(folder)
    architecture.save_processor_files(tokenizer, folder)


def _train_step(trained, optimizer, batch: Batch, step: int, schedule: Schedule) -> list[float]:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, schedule)
    # At these lengths the plain attention is about twice as fast as the CPU's fused one, backward included.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        found = losses(trained["model"], trained["heads"], batch)
    optimizer.zero_grad(set_to_none=True)
    found.total(schedule, step).backward()
    torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()
    parts = (found.answers, found.reading, found.heads, found.naming, found.looking, found.finding)
    return [part.item() for part in parts]


def _optimizer(trained: torch.nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    matrices = [p for p in trained.parameters() if p.ndim >= 2]
    vectors = [p for p in trained.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for weights, tokenizer and log")
    parser.add_argument("--size", choices=list(architecture.SIZES), default="demo")
    parser.add_argument("--steps", type=int, help="instead of the size's own")
    parser.add_argument("--batch", type=int, help="pictures a step, instead of the size's own")
    parser.add_argument("--learning-rate", type=float, help="instead of the size's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {name: getattr(options, name) for name in ("steps", "batch", "learning_rate")}
    schedule = replace(
        schedule_for(options.size), **{name: value for name, value in given.items() if value is not None}
    )
    train(options.output, schedule, options.seed, options.resume, options.size)


if __name__ == "__main__":
    main()
