"""What a folder of ours holds: a run, a bundle or a quantized checkpoint, told by its own files, hashes checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.bits.bitplan import BitCount, real_bits
from toolchain.errors import InputDataError
from toolchain.files.folders import read_json
from toolchain.quantize.checkpoint import QuantizeResult
from toolchain.values import BitPlan


def bits_summary(counts: Mapping[str, BitCount]) -> dict[str, Any]:
    """{"index", "model", "language", "bytes", "parts"}: index bits, real bits over the model and over the decoder."""
    parts = {
        name: {"index": c.index, "real": c.real, "bytes": c.bytes, "weights": c.weights} for name, c in counts.items()
    }
    total = counts["total"]
    return {
        "index": total.index,
        "model": total.real,
        "language": counts["language"].real,
        "bytes": total.bytes,
        "parts": parts,
    }


def quantize_summary(result: QuantizeResult) -> dict[str, Any]:
    """A quantization as JSON: method, bits, bytes, seconds, one entry a layer."""
    bits = bits_summary(result.bits)
    return {
        "method": result.method,
        "layers": len(result.layers),
        "bits": bits,
        "bytes": bits["bytes"],
        "seconds": round(result.seconds, 1),
        "per_layer": [
            {"name": x.name, "part": x.part, "code": x.code, "relative_error": x.relative_error} for x in result.layers
        ],
    }


def inspect_folder(folder: Path) -> tuple[dict[str, Any], str]:
    """(data, text) about a run, a bundle or a quantized checkpoint.

    Raises:
        InputDataError: it is none of these, or a hash does not hold.
    """
    if (folder / "manifest.json").is_file():
        return _bundle(folder)
    if (folder / "run.json").is_file():
        return _run(folder)
    if (folder / "bitplan.json").is_file():
        return _bits(folder / "bitplan.json", "quantized checkpoint")
    raise InputDataError(
        f"{folder}: expected a run (run.json), a bundle (manifest.json) or a quantized checkpoint (bitplan.json)"
    )


def _bundle(folder: Path) -> tuple[dict[str, Any], str]:
    from toolchain.bundle.manifest import open_bundle

    bundle = open_bundle(folder)
    data, text = _bits(bundle.path("bitplan.json"), "bundle")
    data |= {"manifest": bundle.manifest}
    target = (bundle.manifest.get("target") or {}).get("name")
    lines = [
        f"{name:<44}{entry['bytes']:>12,}  {entry['sha256'][:12]}" for name, entry in bundle.manifest["files"].items()
    ]
    head = f"bundle for {target}, made by mgvq {bundle.manifest['tool_version']}: {len(lines)} files, every hash holds"
    return data, "\n".join([head, text, *lines])


def _run(folder: Path) -> tuple[dict[str, Any], str]:
    record = read_json(folder / "run.json")
    lines = [f"run {record['status']}, exit code {record.get('exit_code', '-')}: {record['command']}"]
    for stage in record["stages"]:
        lines.append(f"  {stage['name']:<24}{stage['seconds']:>8.1f} s{'  reused' if stage['reused'] else ''}")
    plan = folder / "stages" / "20-quantize" / "bitplan.json"
    data: dict[str, Any] = {"run": record}
    if plan.is_file():
        more, text = _bits(plan, "quantized checkpoint")
        data |= more
        lines.append(text)
    return data, "\n".join(lines)


def _bits(path: Path, kind: str) -> tuple[dict[str, Any], str]:
    plan = BitPlan.from_json(read_json(path))
    bits = bits_summary(real_bits(plan))
    lines = [f"{kind}: {bits['index']:.2f} index bits, {bits['model']:.2f} real bits a weight over the whole model"]
    for name, part in bits["parts"].items():
        lines.append(
            f"  {name:<12}{part['weights']:>14,} weights{part['index']:>7.2f} index{part['real']:>7.2f} real"
            f"{part['bytes']:>14,} bytes"
        )
    codebooks = {name: code.codebook_bytes for name, code in plan.codebooks().items()}
    lines.append(f"  codebooks: {len(codebooks)}, {sum(codebooks.values()):,} bytes")
    kept = sum(plan.kept.values())
    lines.append(f"  kept in 16 bits: {len(plan.kept)} tensors, {kept:,} elements")
    rotated = {x.group for x in plan.layers if x.rotation}
    if rotated:
        lines.append(f"  inputs rotated: of {len(rotated)} of {len({x.group for x in plan.layers})} groups of layers")
    keys = ("name", "code", "table", "tied_to", "rotation")
    layers = [{key: getattr(x, key) for key in keys} for x in plan.layers]
    found = {"kind": kind, "bits": bits, "layers": layers, "codebooks": codebooks, "kept": plan.kept}
    return found, "\n".join(lines)
