"""What each quantized layer does to its own output, at image positions and at text positions, on inputs held out.

tr(E H Eᵀ) / tr(W H Wᵀ) with H = E[x xᵀ] is Σ ‖E x‖² / Σ ‖W x‖² over the same x. That is how it is computed: no moment
is kept, and a whole model is measured in one pass over its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration.inputs import CalibrationInput, calibration_inputs
from toolchain.checkpoint.folder import open_checkpoint
from toolchain.checkpoint.loading import load_any
from toolchain.checkpoint.modules import keep_decoded, patch_rows
from toolchain.checkpoint.permuted import load_permuted
from toolchain.checkpoint.segmented import vq_layers
from toolchain.errors import ShapeError, UsageError
from toolchain.models.registry import family_for
from toolchain.values import PARTS, SILENT, LayerSpec, Progress, Sample

TEXT, IMAGE = "text", "image"
# Everything these see comes from an image. The head is asked about text alone, since what it says at an image's
# positions is never read, and the embedding too, since images' features take its rows' place there.
IMAGE_PARTS = ("vision", "projector")
TEXT_PARTS = ("embedding", "head")
# Of a weight and its quantized form. Rounded to 2 bits it is 0.9 and more; permuted, or of another model, about 0.
LEAST_COSINE = 0.3


@dataclass(frozen=True)
class LayerError:
    """tr(E H Eᵀ) / tr(W H Wᵀ) of one layer with H of text positions, of image positions, and of both.

    None where no such position reaches the layer. `both` gives either modality half of the mass of H, however many
    positions it has, as `moments.Moments` does.
    """

    name: str
    part: str
    text: float | None
    image: float | None
    both: float

    def to_json(self) -> dict[str, float | None]:
        """{"error_text", "error_image", "error_both"}."""
        return {"error_text": self.text, "error_image": self.image, "error_both": self.both}


@dataclass
class _Sums:
    """Modality → Σ ‖E x‖², Σ ‖W x‖² and the positions they are over."""

    found: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    def add(self, modality: str, difference: Tensor, output: Tensor) -> None:
        if len(output):
            lost, whole, count = self.found.get(modality, (0.0, 0.0, 0))
            lost, whole = lost + _energy(difference), whole + _energy(output)
            self.found[modality] = (lost, whole, count + len(output))

    def error(self, spec: LayerSpec) -> LayerError:
        alone = {name: _share(lost, whole) for name, (lost, whole, _) in self.found.items()}
        means = [(lost / count, whole / count) for lost, whole, count in self.found.values()]
        both = _share(sum(lost for lost, _ in means), sum(whole for _, whole in means))
        return LayerError(spec.name, spec.part, alone.get(TEXT), alone.get(IMAGE), both)


def _energy(rows: Tensor) -> float:
    return float(rows.square().sum(dtype=torch.float64))


def _share(lost: float, whole: float) -> float:
    return lost / whole if whole > 0 else 0.0


def layer_errors(
    dense: nn.Module,
    quantized: nn.Module,
    inputs: Sequence[CalibrationInput],
    specs: Sequence[LayerSpec],
    progress: Progress = SILENT,
) -> tuple[LayerError, ...]:
    """The error of every layer alone, one a spec in their order, on the inputs that full precision gives it.

    Layers that a tied matrix stands in for are measured as what they do: the head by its outputs, the embedding by the
    rows that the inputs' tokens take.

    Args:
        dense: the full-precision model, its channels in the same order as those of `quantized`.
        quantized: the same modules with other weights; anything whose modules have a `weight`.
        inputs: forward passes that nothing was calibrated on.

    Raises:
        UsageError: a weight is no quantized form of the other model's: its channels are in another order, say.
        ShapeError: a weight has another shape than in the other model, or a decoder layer sees other positions than
            the model was given.
    """
    sums = {spec.name: _Sums() for spec in specs}
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        handles = [_watch(dense, quantized, spec, sums[spec.name], state) for spec in specs]
        try:
            for done, one in enumerate(inputs, start=1):
                state["is_image"] = one.is_image
                dense(**one.tensors, use_cache=False)
                progress.step(done, len(inputs), "layer errors")
        finally:
            for handle in handles:
                handle.remove()
    return tuple(sums[spec.name].error(spec) for spec in specs)


def _watch(dense: nn.Module, quantized: nn.Module, spec: LayerSpec, sums: _Sums, state: dict[str, Tensor]) -> Any:
    """A hook on the dense layer that adds up what its inputs become under W and under E."""
    module: Any = dense.get_submodule(spec.name)
    weight = _matrix(dense, spec)
    other = _matrix(quantized, spec)
    if weight.shape != other.shape:
        raise ShapeError(f"layer {spec.name}: expected a weight of {list(weight.shape)}, found {list(other.shape)}")
    other = other.to(weight.device)
    _check_likeness(spec, weight, other)
    difference = weight - other
    kernel = tuple(getattr(module, "kernel_size", None) or module.kernel) if spec.kind == "conv" else None

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach()
        if spec.kind == "embedding":
            ids = x.reshape(-1)
            _split(spec, state["is_image"], sums, difference[ids], weight[ids])
            return
        rows = (patch_rows(x, kernel) if kernel else x).reshape(-1, spec.columns)
        _split(spec, state["is_image"], sums, rows.float() @ difference.T, rows.float() @ weight.T)

    return module.register_forward_pre_hook(hook)


def _check_likeness(spec: LayerSpec, weight: Tensor, other: Tensor) -> None:
    """Refuse weights that have nothing in common: their difference would be no error of quantization."""
    norms = float(weight.norm() * other.norm())
    cosine = float((weight * other).sum()) / norms if norms > 0 else 1.0
    if cosine < LEAST_COSINE:
        raise UsageError(
            f"layer {spec.name}: expected a quantized form of the reference's weight, found a cosine of {cosine:.2f} "
            "between the two; name the checkpoint it was quantized from, with its channels in the same order"
        )


def _matrix(model: nn.Module, spec: LayerSpec) -> Tensor:
    module: Any = model.get_submodule(spec.name)
    return module.weight.detach().flatten(1).float()


def _split(spec: LayerSpec, is_image: Tensor, sums: _Sums, difference: Tensor, output: Tensor) -> None:
    """Add rows, one a position, to the modality they belong to."""
    if spec.part in IMAGE_PARTS:
        sums.add(IMAGE, difference, output)
        return
    if len(output) != len(is_image):
        raise ShapeError(
            f"layer {spec.name}: expected an input for each of {len(is_image)} positions, found {len(output)}"
        )
    sums.add(TEXT, difference[~is_image], output[~is_image])
    if spec.part not in TEXT_PARTS:
        sums.add(IMAGE, difference[is_image], output[is_image])


def checkpoint_layer_errors(
    folder: Path,
    model: nn.Module,
    samples: Sequence[Sample],
    progress: Progress,
    permutations: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """{"name", "part", "code", "error_text", "error_image", "error_both"} of every layer of `model` that is quantized.

    Args:
        folder: the checkpoint to measure from, as a rule the full-precision one `model` was made from. It is gone from
            memory afterwards.
        permutations: that the quantized model's columns are in (`permuted.read_permutations`).

    Raises:
        InputDataError: the checkpoint is broken.
        UsageError: no layer of `model` is quantized, or not from this checkpoint.
    """
    codes = {name: str(module.code) for name, module in vq_layers(model).items()}
    if not codes:
        raise UsageError("no layer of the model is quantized; name a quantized checkpoint to measure its layers")
    base = open_checkpoint(folder)
    config, family = base.config, family_for(base.config)
    specs = [spec for spec in family.layers(config) if spec.name in codes]
    inputs = calibration_inputs(family.load_processor(base.folder, config), samples)
    reference = load_permuted(base, family, permutations) if permutations else load_any(base)
    with keep_decoded(reference):
        errors = layer_errors(reference, model, inputs, specs, progress)
    return [{"name": e.name, "part": e.part, "code": codes[e.name]} | e.to_json() for e in errors]


def worst_layers(layers: Iterable[dict[str, Any]], count: int = 2) -> list[dict[str, Any]]:
    """The `count` layers of the largest `error_both` of every part, part by part, the worst first."""
    known = [layer for layer in layers if layer.get("error_both") is not None]
    found = []
    for part in PARTS:
        members = sorted((x for x in known if x["part"] == part), key=lambda x: x["error_both"], reverse=True)
        found += members[:count]
    return found
