"""Batches for training the built-in VLM: fresh pictures, several questions a sequence, and labels for what is dense.

A question sees the picture and itself, no other question, and stands at the position it would have alone, so that the
weights are trained on exactly what `generate` will see. All pictures of a batch share one grid size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from toolchain.demo import architecture, task
from toolchain.device.families.images import patches_from_image
from toolchain.plan.images import ImagePlan

# Batch lengths are rounded up to this, so that few matrix shapes occur and the CPU's kernels are compiled once.
LENGTH_STEP = 16
HARD = ("beside", "beside", "count_kind", "count_kind", "count_color", "color")  # the kinds that are learned last
_COLOR = re.compile(rf"\b({'|'.join(task.COLORS)})\b")
_KIND = re.compile(rf"\b({'|'.join(task.SHAPES + task.DIGITS)})(?:es|s)?\b")


@dataclass(frozen=True)
class Batch:
    """Pictures of one grid size with their questions.

    patches float32[B, N, 1176]. ids int64[B, S] and positions int64[3, B, S], right-padded. block int64[B, S]: 0 in the
    shared prefix, j in question j (1 is the reading), -1 in padding. is_answer bool[B, S] marks tokens that are scored.
    cells int64[B * cells, 4]: colour, kind (0 for empty), row, column. words int64[B * cells, 2]: token ids of the
    cell's colour and kind as they stand in a question, twice "nothing" for an empty one. mentions int64[M, 2]: (row,
    place) of tokens that complete a name; named bool[M, S]: the picture tokens each names, none where the picture has
    no such thing; found int64[M, 5]: how many it names, and the one's colour, kind, row, column (-100 where not one).
    """

    patches: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    block: torch.Tensor
    is_answer: torch.Tensor
    cells: torch.Tensor
    words: torch.Tensor
    mentions: torch.Tensor
    named: torch.Tensor
    found: torch.Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """One question as tokens; `mention` is the token that completes a name, `cells` what it names in the picture."""

    question: list[int]
    answer: list[int]
    mention: int | None
    cells: list[int]


def make_batch(
    rng: np.random.Generator, tokenizer, plan: ImagePlan, pictures: int, questions: int, hard_share: float = 0.0
) -> Batch:
    """`pictures` fresh pictures of one grid size, each read out whole and asked `questions` questions.

    A share `hard_share` of the questions is of the kinds in HARD; the others are of any kind.
    """
    rows = int(rng.integers(task.ROW_RANGE[0], task.ROW_RANGE[1] + 1))
    columns = int(rng.integers(task.COLUMN_RANGE[0], task.COLUMN_RANGE[1] + 1))
    pads = "<|image_pad|>" * (rows * columns)
    prefix = tokenizer.encode(f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>").ids
    patches, sequences, cells, words = [], [], [], []
    for _ in range(pictures):
        scene = task.random_scene(rng, rows, columns)
        patches.append(patches_from_image(task.draw(scene, rng), plan)[0])
        asked = [task.read_all(scene, rng), *(_ask(scene, rng, hard_share) for _ in range(questions))]
        sequences.append([_asked(tokenizer, scene, *pair) for pair in asked])
        cells += [[*_labels(thing), r, c] for r, row in enumerate(scene.cells) for c, thing in enumerate(row)]
        words += [_words(tokenizer, thing) for row in scene.cells for thing in row]
    labels = (torch.tensor(cells), torch.tensor(words))
    image_id = architecture.token_id(tokenizer, "<|image_pad|>")
    return _collate(patches, prefix, sequences, labels, (rows, columns), image_id)


def _words(tokenizer, thing: task.Thing | None) -> list[int]:
    """The last token of " red" and of " circle" or " 7": one token each, since the tokenizer was trained on them."""
    names = ("nothing", "nothing") if thing is None else (thing.color, thing.kind)
    return [tokenizer.encode(f" {name}").ids[-1] for name in names]


def _ask(scene: task.Scene, rng: np.random.Generator, hard_share: float) -> tuple[str, str]:
    if hard_share and rng.random() < hard_share:
        asked = task.QUESTIONS[HARD[int(rng.integers(len(HARD)))]](scene, rng)
        if asked is not None:
            return asked
    return task.ask(scene, rng)[1:]


def _asked(tokenizer, scene: task.Scene, question: str, answer: str) -> Asked:
    ids = tokenizer.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n").ids
    color, kind = _COLOR.search(question), _KIND.search(question)
    mention, cells = None, []
    # The digits of "row 2, column 3" name places, not things.
    if (color or kind) and "row" not in question:
        end = max(found.end() for found in (color, kind) if found)
        mention = len(tokenizer.encode(question[:end]).ids) - 1
        things = [thing for row in scene.cells for thing in row]
        for index, thing in enumerate(things):
            if thing and (not color or thing.color == color[1]) and (not kind or thing.kind == kind[1]):
                cells.append(index)
    return Asked(ids, tokenizer.encode(answer + "<|im_end|>").ids, mention, cells)


def _labels(thing: task.Thing | None) -> tuple[int, int]:
    kinds = task.SHAPES + task.DIGITS
    return (0, 0) if thing is None else (1 + list(task.COLORS).index(thing.color), 1 + kinds.index(thing.kind))


def _collate(patches, prefix: list[int], sequences, labels, grid: tuple[int, int], image_id: int) -> Batch:
    longest = len(prefix) + max(sum(len(a.question) + len(a.answer) for a in blocks) for blocks in sequences)
    shape = (len(sequences), -(-longest // LENGTH_STEP) * LENGTH_STEP)
    ids, block = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    is_answer, positions = torch.zeros(shape, dtype=torch.bool), torch.zeros(3, *shape, dtype=torch.int64)
    start, after = _prefix_positions(prefix, grid, image_id)
    first, mentions, named, found = prefix.index(image_id), [], [], []
    cell_labels = labels[0].reshape(len(sequences), -1, 4).tolist()
    for i, blocks in enumerate(sequences):
        ids[i, : len(prefix)], block[i, : len(prefix)] = torch.tensor(prefix), 0
        positions[:, i, : len(prefix)] = start
        at = len(prefix)
        for j, asked in enumerate(blocks, start=1):
            end = at + len(asked.question) + len(asked.answer)
            ids[i, at:end], block[i, at:end] = torch.tensor(asked.question + asked.answer), j
            positions[:, i, at:end] = torch.arange(after, after + end - at)
            is_answer[i, at + len(asked.question) : end] = True
            if asked.mention is not None:
                mentions.append([i, at + asked.mention])
                named.append(torch.zeros(shape[1], dtype=torch.bool))
                named[-1][[first + cell for cell in asked.cells]] = True
                one = cell_labels[i][asked.cells[0]] if len(asked.cells) == 1 else [-100] * 4
                found.append([len(asked.cells), *one])
            at = end
    stacked, size = torch.from_numpy(np.stack(patches)), (2 * grid[0], 2 * grid[1])
    return Batch(
        stacked,
        ids,
        positions,
        block,
        is_answer,
        labels[0],
        labels[1],
        torch.tensor(mentions),
        torch.stack(named),
        torch.tensor(found),
        size,
    )


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
