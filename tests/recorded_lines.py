"""What tests of exported lines share: the prompts of a line's samples, and a comparison against recorded calls."""

from __future__ import annotations

from toolchain.device.families.base import open_image
from toolchain.graph.compare import Source, answered, compare_calls

GRAPHS = ("vision", "embed", "decoder")


def prompts_of(line, count: int):
    return [line.host.prepare(open_image(s.image), s.prompt) for s in line.samples[:count]]


def against(name: str, graphs, calls):
    return compare_calls("torch", calls, name, answered(Source(name, graphs), calls))
