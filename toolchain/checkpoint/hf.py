"""Makes transformers load quantized checkpoints: `import toolchain.checkpoint.hf`, then `from_pretrained` as ever.

transformers scans no entry points, so the import is needed; without it the library would build random weights. With
it, a checkpoint that lacks a tensor is refused instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from toolchain.checkpoint.folder import TensorInfo, read_header
from toolchain.checkpoint.install import check_values, install_layers, link_shared
from toolchain.checkpoint.loading import check_tensors, quantized_layers


@register_quantization_config("mgvq")
class MgvqConfig(QuantizationConfigMixin):
    """A checkpoint's quantization_config, every key an attribute, so that it is written back as it was read."""

    def __init__(self, quant_method: Any = "mgvq", **content: Any) -> None:
        self.quant_method = quant_method
        for name, value in content.items():
            setattr(self, name, value)


@register_quantizer("mgvq")
class MgvqQuantizer(HfQuantizer):
    """Builds the quantized modules before loading, and ties codebooks and head after it."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        where = str(getattr(model.config, "_name_or_path", "") or "config.json")
        self.layers = quantized_layers({"quantization_config": self.quantization_config.to_dict()}, where)
        install_layers(model, self.layers)
        if checkpoint_files:
            stored: dict[str, TensorInfo] = {}
            for path in checkpoint_files:
                stored |= read_header(Path(path))
            check_tensors(Path(checkpoint_files[0]).parent, stored, model.state_dict())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        link_shared(model, self.layers)
        check_values(model)
        # Names in our files are those of the module tree: save_pretrained must not turn them into an older release's.
        model._weight_conversions = []

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
