"""VPTQ-style vector quantization (arXiv 2409.17066): vectors along outputs, exact scalar feedback between columns.

Our own code from the paper's public description, at this project's codebook sizes and bits. V rows that lie next to one
another share one index a column, so that the metric inside a vector is diagonal and the feedback needs no blocks. The
weight format has its vectors along inputs and cannot hold these codes: what comes back is decoded, and counted as the
format counts its own: k bits an index, rows and columns padded alike, an entry of 4 bytes, 2 bytes of scale a row.

What is simpler than the paper: no residual stage, no codebook of its own for outlier columns, no fine-tuning of layers
or of the model, and codebooks of at most 256 entries of 4 where its 2-bit models have up to 65,536 of 8. k-means is
weighted by the diagonal of H, as there. What it gets that the paper does not have: the codebook, and then the row
scales, are fitted to the codes in the metric of the layer's output (scales: 4 % of the error on the built-in model's
layers at 2 bits), as MGVQ's are here.

Scales belong to rows here, to columns in VPTQ's release. On the demo's layers, half-trained, at 2 bits, rows leave 0.78
of the error that columns do (geometric mean), and no scales at all 0.92 of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from toolchain.quantize.baselines.compared import ComparedGroup
from toolchain.quantize.baselines.refit import refit_codebook, sum_by_index
from toolchain.values import VQCode
from toolchain.vq.codebook import Samples, round_codebook, train_codebook
from toolchain.vq.factor import factor_moment
from toolchain.vq.scales import refit_scales, rms_scales, stored_scales
from toolchain.vq.solve import safe_divisor
from toolchain.vq.weights import Options, Problem, output_errors, stack_group

REFIT_STEPS = 25


def vectors_of(matrix: Tensor, vector: int) -> Tensor:
    """[m / V, n, V] from [m, n]: V neighbouring rows of one column are a vector."""
    return matrix.reshape(-1, vector, matrix.shape[1]).transpose(1, 2)


def decode_columns(indices: Tensor, codebook: Tensor, scales: Tensor) -> Tensor:
    """Ŵ float32[m, n] from one index a vector, int64[m / V, n], and row scales [m]."""
    unit = codebook.float()[indices].transpose(1, 2).reshape(len(scales), -1)
    return unit * scales.float()[:, None]


def draw_columns(
    weight: Tensor, scales: Tensor, importance: Tensor, vector: int, count: int, generator: torch.Generator
) -> Samples:
    """At most `count` vectors at unit row scale; row i weighs scale_i² · importance_j in column j.

    Args:
        weight: float32[m, n].
        scales: float32[m].
        importance: float32[n].
        generator: draws which; the result depends on nothing else random.
    """
    unit = vectors_of(weight / safe_divisor(scales)[:, None], vector)
    vectors, columns = unit.reshape(-1, vector), unit.shape[1]
    places = torch.randperm(len(vectors), generator=generator, device=generator.device)[:count].to(weight.device)
    worth = scales.reshape(-1, vector).square()[places // columns] * importance[places % columns][:, None]
    return Samples(vectors[places], worth.diag_embed())


def column_sweep(weight: Tensor, unit: Tensor, codebook: Tensor, scales: Tensor) -> Tensor:
    """Indices int64[m / V, n]: column after column, each the nearest entries to W_k + Σ_{j<k} E_j U_jk.

    Args:
        weight: float32[m, n].
        unit: float32[n, n], U of the damped second moment, with V = 1.
        codebook: [2^L, V], as stored.
        scales: float16[m], as stored.
    """
    entries = codebook.float()
    groups = scales.float().reshape(-1, entries.shape[1])
    error = torch.zeros_like(weight)
    chosen = []
    for at in range(weight.shape[1]):
        target = weight[:, at] + error[:, :at] @ unit[:at, at]
        # Σ_v (t_v − a_v·c_v)² less what no entry changes
        costs = groups.square() @ entries.square().T - 2 * (groups * target.reshape(groups.shape)) @ entries.T
        chosen.append(costs.argmin(dim=1))
        error[:, at] = weight[:, at] - (entries[chosen[-1]] * groups).flatten()
    return torch.stack(chosen, dim=1)


def refitted(weight: Tensor, moment: Tensor, indices: Tensor, codebook: Tensor, scales: Tensor) -> Tensor:
    """float32[2^L, V]: the codebook refitted to these indices, in weights at unit scale."""
    flat, vector = indices.flatten(), codebook.shape[1]

    def gather(gradient: Tensor) -> Tensor:
        pulled = vectors_of(gradient * scales.float()[:, None], vector)
        return sum_by_index(pulled.reshape(-1, vector), flat, len(codebook))

    def decode(entries: Tensor) -> Tensor:
        return decode_columns(indices, entries, scales)

    return refit_codebook(weight, moment, codebook.float(), decode, gather, REFIT_STEPS)


def quantize_group(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
) -> ComparedGroup:
    """A codebook trained with diag H as weights, one sweep over the columns, codebook and scales fitted to its
    codes.
    """
    padded = [F.pad(w.float(), (0, 0, 0, -len(w) % code.vector)) for w in weights]
    problem = stack_group(padded, moment, code)
    weight = problem.weight
    factors = factor_moment(problem.moment, problem.columns, 1, options.damping)
    start = rms_scales(weight, problem.columns)
    importance = factors.damped.diagonal()
    samples = draw_columns(weight, start, importance, code.vector, options.samples, generator)
    codebook, cells = train_codebook(samples, code.entries, options.lloyd_rounds, generator)
    stored, step = round_codebook(codebook, cells, code)
    scales = stored_scales(start * step)
    indices = column_sweep(weight, factors.unit, stored, scales)
    fitted, factor = round_codebook(refitted(weight, factors.damped, indices, stored, scales), cells, code)
    tried = [(stored, scales), (fitted, stored_scales(scales.float() * factor))]
    unit = decode_columns(indices, fitted, torch.ones_like(scales))
    tried.append((fitted, stored_scales(refit_scales(weight, unit, factors.damped, tried[-1][1].float()))))
    decoded = [decode_columns(indices, *one) for one in tried]
    best = min(decoded, key=lambda one: float(output_errors(weight - one, problem).sum()))
    return compared_group(problem, best, [len(w) for w in weights], code)


def compared_group(problem: Problem, decoded: Tensor, rows: list[int], code: VQCode) -> ComparedGroup:
    """The group's layers of `rows` rows each, without the rows and columns that padded them, and their bytes."""
    error = output_errors(problem.weight - decoded, problem).split(problem.rows)
    reference = output_errors(problem.weight, problem).split(problem.rows)
    parts = zip(decoded.split(problem.rows), error, reference, rows)
    cut = [(w[:n, : problem.columns], float(e[:n].sum()), float(r[:n].sum())) for w, e, r, n in parts]
    layers, errors, references = zip(*cut)
    size = code.codebook_bytes + sum(code.codes_bytes(n, problem.columns) + 2 * n for n in rows)
    return ComparedGroup(layers, errors, references, size)
