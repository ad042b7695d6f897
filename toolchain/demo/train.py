"""Train the built-in VLM from scratch on the drawn task: `python -m toolchain.demo.train -o FOLDER`.

Two phases. First the model reads whole pictures in raster order, while two linear heads that are thrown away afterwards
name each cell's colour and kind from its vision token; this dense supervision breaks the long plateau that question
answering alone sits on (reading without the heads was still on it after 900 steps). Then all question kinds, with a
tenth of whole-picture reading kept in.
Each batch holds pictures of one grid size, so that vision attention is one batched call; the trained weights are plain
transformers weights, and `--resume` continues from the last checkpoint. Needs torch, a CPU is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from toolchain.demo import architecture, task
from toolchain.device.images import ImagePlan, patches_from_image

# Batch lengths are rounded up to this, so that few matrix shapes occur and the CPU's kernels are compiled once.
LENGTH_STEP = 16


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: steps, warm-up, the share of steps spent on whole-picture reading alone."""

    steps: int = 6000
    batch: int = 64
    warmup: int = 150
    reading_share: float = 0.2
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    cell_weight: float = 0.5


@dataclass(frozen=True)
class Batch:
    """patches float32[B, N, 1176]; ids int64[B, S] right-padded; is_answer bool[B, S] marks tokens that are scored.

    `cells` int64[B * rows * columns, 2] holds each cell's colour and kind, 0 for an empty cell.
    """

    patches: torch.Tensor
    ids: torch.Tensor
    is_answer: torch.Tensor
    cells: torch.Tensor
    grid: tuple[int, int]


def prompt_text(question: str, image_tokens: int) -> str:
    """The chat template's text for one picture and one question, the image pad already repeated."""
    pads = "<|image_pad|>" * image_tokens
    return f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"


def make_batch(rng: np.random.Generator, tokenizer, plan: ImagePlan, size: int, reading: float) -> Batch:
    """`size` fresh pictures of one grid size with a question each; `reading` is the share of whole-picture reading."""
    low, high = task.GRID_RANGE
    rows, columns = (int(v) for v in rng.integers(low, high + 1, size=2))
    patches, sequences, answer_starts, cells = [], [], [], []
    for _ in range(size):
        scene = task.random_scene(rng, rows, columns)
        patches.append(patches_from_image(task.draw(scene, rng), plan)[0])
        if rng.random() < reading:
            question, answer = task.read_all(scene, rng)
        else:
            _, question, answer = task.ask(scene, rng)
        prompt = tokenizer.encode(prompt_text(question, rows * columns)).ids
        sequences.append(prompt + tokenizer.encode(answer + "<|im_end|>").ids)
        answer_starts.append(len(prompt))
        cells.extend(_cell_labels(thing) for row in scene.cells for thing in row)
    longest = -(-max(map(len, sequences)) // LENGTH_STEP) * LENGTH_STEP
    ids = torch.zeros(size, longest, dtype=torch.int64)
    is_answer = torch.zeros(size, longest, dtype=torch.bool)
    for i, (sequence, start) in enumerate(zip(sequences, answer_starts)):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        is_answer[i, start : len(sequence)] = True
    return Batch(torch.from_numpy(np.stack(patches)), ids, is_answer, torch.tensor(cells), (rows * 2, columns * 2))


def _cell_labels(thing: task.Thing | None) -> tuple[int, int]:
    kinds = task.SHAPES + task.DIGITS
    return (0, 0) if thing is None else (1 + list(task.COLORS).index(thing.color), 1 + kinds.index(thing.kind))


class CellHeads(torch.nn.Module):
    """Names each vision token's cell, for training only: logits over colours and over kinds, 0 meaning empty."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.color = torch.nn.Linear(width, 1 + len(task.COLORS))
        self.kind = torch.nn.Linear(width, 1 + len(task.SHAPES + task.DIGITS))

    def loss(self, features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Sum of the two mean cross-entropies (nats a cell)."""
        color, kind = self.color(features).float(), self.kind(features).float()
        return F.cross_entropy(color, cells[:, 0]) + F.cross_entropy(kind, cells[:, 1])


def losses(model, heads: CellHeads, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean cross-entropy in nats over answer tokens, the heads' loss) of a batch whose pictures share a grid size."""
    features = _batched_vision(model.model.visual, batch.patches, batch.grid)
    embeds = model.get_input_embeddings()(batch.ids)
    is_image = batch.ids == model.config.image_token_id
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1), features.to(embeds.dtype))
    positions = _positions(model, batch)
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    scored = hidden.last_hidden_state[:, :-1][batch.is_answer[:, 1:]]
    answer = F.cross_entropy(model.lm_head(scored).float(), batch.ids[:, 1:][batch.is_answer[:, 1:]])
    return answer, heads.loss(features, batch.cells)


def _positions(model, batch: Batch) -> torch.Tensor:
    """mRoPE ids int64[3, B, S]: with one grid size and right padding, one row serves the whole batch."""
    row = batch.ids[:1]
    grid = torch.tensor([[1, *batch.grid]])
    ids, _ = model.model.get_rope_index(
        row, mm_token_type_ids=(row == model.config.image_token_id).int(), image_grid_thw=grid
    )
    return ids.expand(3, batch.ids.shape[0], -1)


def _batched_vision(visual, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Image features [B * N / 4, hidden]: the tower's own layers, attention batched over pictures of one size."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
    from transformers.vision_utils import get_vision_position_ids

    count, tokens, _ = patches.shape
    # The patch convolution's stride equals its kernel: as a matrix product it is the same sum, several times faster.
    hidden = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    ids = get_vision_position_ids(torch.tensor([[1, *grid]]), visual.spatial_merge_size)
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
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(folder: Path, schedule: Schedule, seed: int, resume: bool) -> None:
    """Train and save weights, tokenizer and log into `folder`; a checkpoint every 250 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = architecture.train_tokenizer(seed)
    plan = ImagePlan(min_pixels=architecture.MIN_PIXELS, max_pixels=architecture.MAX_PIXELS)
    model = architecture.build_model(tokenizer, seed)
    heads = CellHeads(model.config.text_config.hidden_size)
    optimizer = _optimizer(torch.nn.ModuleList([model, heads]), schedule)
    start, checkpoint = 0, folder / "training.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    log = (folder / "training_log.jsonl").open("a" if start else "w")
    began, history = time.monotonic(), []
    for step in range(start, schedule.steps):
        rng = np.random.default_rng([seed, 1, step])
        reading = 1.0 if step < schedule.reading_share * schedule.steps else 0.1
        batch = make_batch(rng, tokenizer, plan, schedule.batch, reading)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, schedule)
        # At these lengths the plain attention is about twice as fast as the CPU's fused one, backward included.
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            answer, cells = losses(model, heads, batch)
        optimizer.zero_grad(set_to_none=True)
        (answer + schedule.cell_weight * cells).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append((float(answer), float(cells)))
        if (step + 1) % 50 == 0:
            mean = np.mean(history[-50:], axis=0)
            line = {"step": step + 1, "loss": round(float(mean[0]), 4), "cells": round(float(mean[1]), 4)}
            line |= {"seconds": round(time.monotonic() - began), "reading": reading}
            print(json.dumps(line), file=log, flush=True)
        if (step + 1) % 250 == 0:
            state = {"model": model.state_dict(), "heads": heads.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    model.to(torch.float16).save_pretrained(folder)
    architecture.save_processor_files(tokenizer, folder)


def _optimizer(model, schedule: Schedule) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for weights, tokenizer and log")
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--batch", type=int, default=Schedule.batch)
    parser.add_argument("--learning-rate", type=float, default=Schedule.learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    schedule = Schedule(steps=options.steps, batch=options.batch, learning_rate=options.learning_rate)
    train(options.output, schedule, options.seed, options.resume)


if __name__ == "__main__":
    main()
