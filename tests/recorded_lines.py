"""What tests of exported lines share: a line's stages, the prompts of its samples, a comparison against its calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from toolchain.checkpoint.loading import load_quantized
from toolchain.device.engines.compare import Source, answered, compare_calls
from toolchain.device.families.base import open_image
from toolchain.graph.export import reference_graphs_from_model
from toolchain.graph.rewrite import device_form, portable_form
from toolchain.graph.validate import validate_line
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.values import Sample

GRAPHS = ("vision", "embed", "decoder")


def prompts_of(line, count: int):
    return [line.host.prepare(open_image(s.image), s.prompt) for s in line.samples[:count]]


def against(name: str, graphs, calls):
    return compare_calls("torch", calls, name, answered(Source(name, graphs), calls))


def made_line(model: Path, samples: list[Sample], root: Path, **quantizing) -> SimpleNamespace:
    """A checkpoint quantized from two samples, exported, and rewritten both ways, in folders of `root`."""
    quantize_checkpoint(model, samples[:2], root / "quantized", QuantizeSettings(**quantizing))
    quantized = load_quantized(root / "quantized")
    family = family_for(read_config(model))
    for name in ("reference", "device", "portable"):
        (root / name).mkdir()
    exported = reference_graphs_from_model(quantized, family, root / "reference")
    report = device_form(root / "reference", root / "device")
    portable_form(root / "reference", root / "portable")
    host = family.load_host(read_config(model), model)
    return SimpleNamespace(
        root=root, model=model, quantized=quantized, family=family, exported=exported, report=report, host=host,
        samples=samples,
    )  # fmt: skip


def validate(line, folder: Path, **options):
    """`validate_line` of a line's stages with two of its samples."""
    stages = (line.model, line.root / "quantized", line.root / "reference", line.root / "device")
    return validate_line(line.family, *stages, line.samples[:2], folder, **({"steps": 2} | options))
