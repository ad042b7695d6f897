"""Rewrite passes over an onnx-graphsurgeon graph, one a file.

Each finds its pattern, checks it, rewrites in place, and says what it did and what it refused with the reason.

May import `graph.op` and what stands above it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """A place that matched the pattern and was left as it was."""

    where: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did, by node, tensor or function name."""

    name: str
    done: tuple[str, ...]
    refused: tuple[Refusal, ...] = ()
