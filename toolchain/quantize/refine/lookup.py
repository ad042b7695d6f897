"""Decoding that can be differentiated: gradients of codebooks and row scales for codes that stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolchain.checkpoint.modules import VQModule, chunk_windows, vq_modules
from toolchain.values import CHUNK_ROWS, VQCode

INT8_LIMIT = 127


def lookup_indices(module: VQModule) -> Tensor:
    """Codebook index of every lookup, [rows, ⌈columns / V⌉]: uint8 for up to 256 entries, int16 above.

    Unpacked once, because a step of fine-tuning decodes every weight and the codes never change.
    """
    code = module.code
    chunks = module.codes.reshape(*code.chunk_shape(module.rows, module.columns), code.chunk_bytes)
    windows = chunk_windows(chunks, code, torch.arange(CHUNK_ROWS, device=chunks.device))
    matrix = windows.permute(0, 3, 1, 2).reshape(-1, chunks.shape[2])
    narrow = torch.uint8 if code.entries <= 256 else torch.int16
    return matrix[: module.rows, : -(-module.columns // code.vector)].to(narrow)


def scaled_lookup(codebook: Tensor, scales: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Ŵ float32[rows, columns] = scale · entry, equal to `modules.decode_weight` bit for bit; differentiable.

    Args:
        codebook: float32[entries, V].
        scales: float32[rows].
        indices: integers [rows, ⌈columns / V⌉], see `lookup_indices`.
    """
    return _ScaledLookup.apply(codebook, scales, indices, columns)


class _ScaledLookup(torch.autograd.Function):
    """∂/∂T[e] = Σ a[i] · G[i, block] over the lookups of entry e; ∂/∂a[i] = Σ G[i, :] · T[…]. Entries are looked up
    again on the way back: that takes 3 ms for 5 M weights, and keeping them would take the memory of all weights.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, scales: Tensor, indices: Tensor, columns: int) -> Tensor:
        ctx.save_for_backward(codebook, scales, indices)
        return _entries(codebook, indices, columns) * scales[:, None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codebook, scales, indices = ctx.saved_tensors
        gradient = gradients[0]
        by_scale = (gradient * _entries(codebook, indices, gradient.shape[1])).sum(dim=1)
        blocks = gradient * scales[:, None]
        missing = indices.shape[1] * codebook.shape[1] - gradient.shape[1]
        if missing:
            blocks = torch.nn.functional.pad(blocks, (0, missing))
        return (
            sum_by_entry(blocks.reshape(-1, codebook.shape[1]), indices.reshape(-1), len(codebook)),
            by_scale,
            None,
            None,
        )


def _entries(codebook: Tensor, indices: Tensor, columns: int) -> Tensor:
    """float32[rows, columns]: the codebook's entries, side by side."""
    found = torch.nn.functional.embedding(indices.int(), codebook)
    return found.reshape(indices.shape[0], -1)[:, :columns]


def sum_by_entry(blocks: Tensor, indices: Tensor, entries: int) -> Tensor:
    """float32[entries, V]: for each entry the sum of the rows of `blocks` [t, V] whose index names it.

    The same bytes every time. On a CPU, for 5.3 M weights and one thread: index_add with int64 10 ms, with int32 84,
    bincount a column 16, index_put 17, segment_reduce of sorted rows 20.
    """
    total = torch.zeros(entries, blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    where = indices.long()
    if blocks.is_cuda:
        # There index_add adds in whatever order the threads come; index_put sorts first.
        return total.index_put_((where,), blocks, accumulate=True)
    return total.index_add_(0, where, blocks)


def straight_through(exact: Tensor, stored: Tensor) -> Tensor:
    """`stored`, bit for bit, with the gradient going to `exact` as if nothing had been rounded (straight-through)."""
    return _Through.apply(exact, stored)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, stored: Tensor) -> Tensor:
        return stored.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def rounded_codebook(exact: Tensor, code: VQCode) -> Tensor:
    """The codebook float32[entries, V] as the format stores it: whole numbers within ±127, or float16 values.

    An entry beyond ±127 gets no gradient, so that it does not wander off.
    """
    if code.codebook_dtype == "int8":
        held = exact.clamp(-INT8_LIMIT, INT8_LIMIT)
        return straight_through(held, held.detach().round())
    return rounded_to(exact, torch.float16)


def rounded_to(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values a tensor of `dtype` can hold, nearest to the exact ones."""
    return straight_through(exact, exact.detach().to(dtype).float())


# Norms are about 1 and most biases less; a value at zero would otherwise never move.
SMALLEST_SIZE = 0.1

Offsets = dict[str, dict[str, Tensor]]


class TunedWeights:
    """The continuous values of a quantized model as functions of offsets, all zero at the start.

    codebook = start + rms · offset, scale = start · exp(offset), kept value = start + max(rms, 0.1) · offset: a
    learning rate is thus a relative step for every tensor, scales cannot change sign, and a scale of 0 stays 0.

    `offsets` maps "codebooks" (by codebook id), "scales" and "kept" (by name) to float32 leaves that want gradients.
    Kept are
    the parameters of one dimension: norm weights, and the biases of norms and linears.
    """

    def __init__(self, model: nn.Module, kept_dtype: torch.dtype) -> None:
        self.model, self.kept_dtype = model, kept_dtype
        self.modules = {name: m for name, m in vq_modules(model).items() if not m._tied_to}
        self.tied = [m for m in vq_modules(model).values() if m._tied_to]
        self.codes = {m.codebook_id: m.code for m in self.modules.values()}
        self.indices = {name: lookup_indices(m) for name, m in self.modules.items()}
        self.kept = {name: p for name, p in model.named_parameters() if p.ndim == 1}
        self.start: Offsets = {
            "codebooks": {m.codebook_id: m.codebook.float() for m in self.modules.values()},
            "scales": {name: m.scales.float() for name, m in self.modules.items()},
            "kept": {name: p.detach().clone() for name, p in self.kept.items()},
        }
        self.offsets: Offsets = {
            kind: {name: torch.zeros_like(x, dtype=torch.float32).requires_grad_() for name, x in values.items()}
            for kind, values in self.start.items()
        }
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._before = {p: p.requires_grad for p in model.parameters()}
        self._were_decoded = {m: m._decoded is not None for m in vq_modules(model).values()}

    def values(self, offsets: Offsets) -> Offsets:
        """float32 values as they are stored, differentiable in the offsets."""
        start = self.start
        codebooks = {
            name: rounded_codebook(start["codebooks"][name] + _rms(start["codebooks"][name]) * x, self.codes[name])
            for name, x in offsets["codebooks"].items()
        }
        scales = {n: rounded_to(start["scales"][n] * x.exp(), torch.float16) for n, x in offsets["scales"].items()}
        kept = {}
        for name, x in offsets["kept"].items():
            begin = start["kept"][name].float()
            kept[name] = rounded_to(begin + _rms(begin).clamp(min=SMALLEST_SIZE) * x, self.kept_dtype)
        return {"codebooks": codebooks, "scales": scales, "kept": kept}

    def install(self) -> None:
        """Put the values of the offsets into the model as dense leaves, whose gradients add up until `backward`."""
        values = self.values(self.offsets)
        self._pairs = []
        for parameter in self._before:
            parameter.requires_grad_(False)
        for name, module in self.modules.items():
            codebook, scales = values["codebooks"][module.codebook_id], values["scales"][name]
            weight = scaled_lookup(codebook, scales, self.indices[name], module.columns)
            module._decoded = weight.detach().to(module.compute_dtype).requires_grad_()
            self._pairs.append((weight, module._decoded))
        for module in self.tied:
            module._decoded = module._tied_to[0]._decoded
        for name, parameter in self.kept.items():
            parameter.data.copy_(values["kept"][name].detach())
            parameter.requires_grad_().grad = None
            self._pairs.append((values["kept"][name], parameter))

    def backward(self) -> None:
        """Gradients of the offsets, from those that the model's weights have gathered since `install`."""
        reached = [(value, leaf.grad.float()) for value, leaf in self._pairs if leaf.grad is not None]
        for offset in (x for kind in self.offsets.values() for x in kind.values()):
            offset.grad = None
        torch.autograd.backward([value for value, _ in reached], [gradient for _, gradient in reached])
        self._pairs = []

    def release(self) -> None:
        """Give the model back as it was at the start, bit for bit."""
        self._pairs = []
        for name, parameter in self.kept.items():
            parameter.data.copy_(self.start["kept"][name])
        for parameter, wanted in self._before.items():
            parameter.grad = None
            parameter.requires_grad_(wanted)
        for module, decoded in self._were_decoded.items():
            module.keep(decoded)

    @torch.no_grad()
    def store(self, offsets: Offsets) -> None:
        """Write the values of `offsets` into the model's buffers and parameters, in place: shared stays shared."""
        values = self.values(offsets)
        for name, module in self.modules.items():
            module.codebook.copy_(values["codebooks"][module.codebook_id])
            module.scales.copy_(values["scales"][name])
        for name, parameter in self.kept.items():
            parameter.copy_(values["kept"][name])
        for module, decoded in self._were_decoded.items():
            module.keep(decoded)

    def copied(self) -> Offsets:
        """The offsets as they are now."""
        return {kind: {name: x.detach().clone() for name, x in own.items()} for kind, own in self.offsets.items()}

    @torch.no_grad()
    def load(self, offsets: Offsets) -> None:
        """Go on from offsets that `copied` gave."""
        for kind, own in self.offsets.items():
            for name, x in own.items():
                x.copy_(offsets[kind][name])


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
