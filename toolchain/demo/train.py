"""Train the built-in VLM from scratch on the drawn task: `python -m toolchain.demo.train -o FOLDER`.

Question answering alone sits on a long plateau. Three kinds of dense supervision break it: every picture is also read
out whole in raster order; linear heads that are thrown away afterwards name each cell's colour and kind from its vision
token; and others name the cell's row and column from the decoder's second layer. Each picture carries several questions
in one sequence: a question sees the picture and itself, no other question, and stands at the position it would have
alone, so that the weights are trained on exactly what `generate` will see. All pictures of a batch share one grid size,
which makes vision attention one batched call. `--resume` continues from the last checkpoint.
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
from toolchain.device.images import ImagePlan, grid_position_ids, patches_from_image

# Batch lengths are rounded up to this, so that few matrix shapes occur and the CPU's kernels are compiled once.
LENGTH_STEP = 16
PLACE_LAYER = 1  # decoder layer after which image tokens must know where they stand


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. `batch` counts pictures, each with a reading and `questions` questions."""

    steps: int = 4000
    batch: int = 24
    questions: int = 6
    warmup: int = 100
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    reading_weight: float = 0.5
    head_weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Pictures of one grid size with their questions.

    patches float32[B, N, 1176]. ids int64[B, S] and positions int64[3, B, S], right-padded. block int64[B, S]: 0 in the
    shared prefix, j in question j (1 is the reading), -1 in padding. is_answer bool[B, S] marks tokens that are scored.
    cells int64[B * cells, 4]: colour, kind (0 for empty), row, column.
    """

    patches: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    block: torch.Tensor
    is_answer: torch.Tensor
    cells: torch.Tensor
    grid: tuple[int, int]


def make_batch(rng: np.random.Generator, tokenizer, plan: ImagePlan, schedule: Schedule) -> Batch:
    """`schedule.batch` fresh pictures of one grid size, each read out whole and asked about."""
    rows = int(rng.integers(task.ROW_RANGE[0], task.ROW_RANGE[1] + 1))
    columns = int(rng.integers(task.COLUMN_RANGE[0], task.COLUMN_RANGE[1] + 1))
    pads = "<|image_pad|>" * (rows * columns)
    prefix = tokenizer.encode(f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>").ids
    patches, sequences, cells = [], [], []
    for _ in range(schedule.batch):
        scene = task.random_scene(rng, rows, columns)
        patches.append(patches_from_image(task.draw(scene, rng), plan)[0])
        asked = [task.read_all(scene, rng), *(task.ask(scene, rng)[1:] for _ in range(schedule.questions))]
        sequences.append([_question_ids(tokenizer, *pair) for pair in asked])
        cells += [[*_labels(thing), r, c] for r, row in enumerate(scene.cells) for c, thing in enumerate(row)]
    return _collate(
        patches, prefix, sequences, cells, (rows, columns), architecture.token_id(tokenizer, "<|image_pad|>")
    )


def _question_ids(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    asked = tokenizer.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n").ids
    return asked, tokenizer.encode(answer + "<|im_end|>").ids


def _labels(thing: task.Thing | None) -> tuple[int, int]:
    kinds = task.SHAPES + task.DIGITS
    return (0, 0) if thing is None else (1 + list(task.COLORS).index(thing.color), 1 + kinds.index(thing.kind))


def _collate(patches, prefix: list[int], sequences, cells, grid: tuple[int, int], image_id: int) -> Batch:
    longest = len(prefix) + max(sum(len(q) + len(a) for q, a in blocks) for blocks in sequences)
    shape = (len(sequences), -(-longest // LENGTH_STEP) * LENGTH_STEP)
    ids, block = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    is_answer, positions = torch.zeros(shape, dtype=torch.bool), torch.zeros(3, *shape, dtype=torch.int64)
    start, after = _prefix_positions(prefix, grid, image_id)
    for i, blocks in enumerate(sequences):
        ids[i, : len(prefix)], block[i, : len(prefix)] = torch.tensor(prefix), 0
        positions[:, i, : len(prefix)] = start
        at = len(prefix)
        for j, (asked, answer) in enumerate(blocks, start=1):
            end = at + len(asked) + len(answer)
            ids[i, at:end], block[i, at:end] = torch.tensor(asked + answer), j
            positions[:, i, at:end] = torch.arange(after, after + end - at)
            is_answer[i, at + len(asked) : end] = True
            at = end
    stacked = torch.from_numpy(np.stack(patches))
    return Batch(stacked, ids, positions, block, is_answer, torch.tensor(cells), (2 * grid[0], 2 * grid[1]))


def _prefix_positions(prefix: list[int], grid: tuple[int, int], image_id: int) -> tuple[torch.Tensor, int]:
    """(mRoPE ids int64[3, prefix], position of the token after it); the rule of device/families/qwen2_vl.py."""
    rows, columns = grid
    first = prefix.index(image_id)
    positions = torch.arange(len(prefix)).repeat(3, 1)
    row, column = np.divmod(np.arange(rows * columns), columns)
    inside = slice(first, first + rows * columns)
    positions[0, inside] = first
    positions[1, inside], positions[2, inside] = torch.from_numpy(first + row), torch.from_numpy(first + column)
    tail = len(prefix) - inside.stop
    positions[:, inside.stop :] = first + max(rows, columns) + torch.arange(tail)
    return positions, first + max(rows, columns) + tail


class Heads(torch.nn.Module):
    """Training only: each vision token's colour and kind (0 empty), and where the decoder thinks it stands."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.color = torch.nn.Linear(width, 1 + len(task.COLORS))
        self.kind = torch.nn.Linear(width, 1 + len(task.SHAPES + task.DIGITS))
        self.row = torch.nn.Linear(width, task.ROW_RANGE[1])
        self.column = torch.nn.Linear(width, task.COLUMN_RANGE[1])

    def loss(self, features: torch.Tensor, placed: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Sum of the four mean cross-entropies (nats a cell)."""
        logits = (self.color(features), self.kind(features), self.row(placed), self.column(placed))
        return torch.stack([F.cross_entropy(x.float(), cells[:, i]) for i, x in enumerate(logits)]).sum()


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropy in nats a token over the answers and over the readings, and the heads' sum."""

    answers: torch.Tensor
    reading: torch.Tensor
    heads: torch.Tensor

    def total(self, schedule: Schedule) -> torch.Tensor:
        return self.answers + schedule.reading_weight * self.reading + schedule.head_weight * self.heads


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
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if index == PLACE_LAYER:
            placed = hidden[is_image]
    is_scored = batch.is_answer[:, 1:]
    logits = model.lm_head(decoder.norm(hidden[:, :-1][is_scored])).float()
    nats = F.cross_entropy(logits, batch.ids[:, 1:][is_scored], reduction="none")
    is_reading = batch.block[:, 1:][is_scored] == 1
    return Losses(nats[~is_reading].mean(), nats[is_reading].mean(), heads.loss(features, placed, batch.cells))


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
            batch = make_batch(np.random.default_rng([seed, 1, step]), tokenizer, plan, schedule)
            history.append(_train_step(trained, optimizer, batch, learning_rate_at(step, schedule), schedule))
            if (step + 1) % 50 == 0:
                answers, reading, heads = np.mean(history[-50:], axis=0).round(4).tolist()
                line = {"step": step + 1, "answers": answers, "reading": reading, "heads": heads}
                print(json.dumps(line | {"seconds": round(time.monotonic() - began)}), file=log, flush=True)
            if (step + 1) % 250 == 0:
                state = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").rename(checkpoint)
    model.to(torch.float16).save_pretrained(folder)
    architecture.save_processor_files(tokenizer, folder)


def _train_step(trained, optimizer, batch: Batch, rate: float, schedule: Schedule) -> tuple[float, float, float]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    # At these lengths the plain attention is about twice as fast as the CPU's fused one, backward included.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        found = losses(trained["model"], trained["heads"], batch)
    optimizer.zero_grad(set_to_none=True)
    found.total(schedule).backward()
    torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()
    return found.answers.item(), found.reading.item(), found.heads.item()


def _optimizer(trained: torch.nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    matrices = [p for p in trained.parameters() if p.ndim >= 2]
    vectors = [p for p in trained.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for weights, tokenizer and log")
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--batch", type=int, default=Schedule.batch, help="pictures a step")
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
