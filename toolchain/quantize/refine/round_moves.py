"""One group's move in a Jacobi round: codes chosen again for weights that were moved, and what a model stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from toolchain.checkpoint.install import CODEBOOKS, link_shared
from toolchain.checkpoint.modules import VQModule, chunk_windows, vq_modules
from toolchain.quantize.mgvq.proxy import GAUSSIAN_ERROR
from toolchain.values import CHUNK_ROWS, BitPlan, VQCode
from toolchain.vq.assign import index_dtype
from toolchain.vq.curvature import damp
from toolchain.vq.descent import Descent, descend
from toolchain.vq.drift import TRUST
from toolchain.vq.factor import factor_moment
from toolchain.vq.kronecker import Objective
from toolchain.vq.refit_cg import refit
from toolchain.vq.solve import Solution
from toolchain.vq.weights import Problem, VQWeights, pack_group, stack_group

CAP_TRIES = 6  # the least gain of a change is raised so often to stay under the cap
BATCH_BYTES = 8 << 30  # of statistics held at a time: those of about one block of a 7B model


@dataclass(frozen=True)
class RoundOptions:
    """What a round may do. `dampings` are of (S_o, S_i) in the Newton step, shares of the mean diagonals. Refits
    leave a codebook that several groups use as it is, and with `keeps_codebook` every one.
    """

    steps: tuple[float, ...] = (0.1, 0.2, 0.4, 1.0)
    dampings: tuple[float, float] = (0.1, 0.1)
    cap: float = 0.05  # of a group's codes that may change
    moment_damping: float = 0.01  # of S_i in the objective, as in the sweep
    refits: bool = True
    keeps_codebook: bool = False
    descent: Descent = field(default_factory=lambda: Descent(sweeps=1))
    batch_bytes: int = BATCH_BYTES  # changes what is held at a time and how often inputs pass, no result


def stored_weights(model: nn.Module, names: Sequence[str]) -> dict[str, VQWeights]:
    """Layer → what it holds now; nothing here is changed when the model takes over other weights."""
    found = {}
    modules = vq_modules(model)
    for name in names:
        module = modules[name]
        found[name] = VQWeights(
            module.code, module.rows, module.columns, module.codes, module.codebook.clone(), module.scales
        )
    return found


def store_weights(model: nn.Module, weights: Mapping[str, VQWeights], plan: BitPlan) -> None:
    """The model takes these weights over: codes, scales, and the codebooks that it stores once."""
    codebooks, modules = model.get_submodule(CODEBOOKS), vq_modules(model)
    for name, stored in weights.items():
        modules[name].set_weights(stored)
        codebooks.get_buffer(plan.layer(name).table).copy_(stored.codebook)
    link_shared(model, plan.layers)


def windows_of(module: VQModule) -> Tensor:
    """Codebook indices [m, n / V] of a module's codes, m rows padded to whole row groups, n to whole column groups."""
    code = module.code
    chunks = module.codes.view(*code.chunk_shape(module.rows, module.columns), code.chunk_bytes)
    windows = chunk_windows(chunks, code, torch.arange(CHUNK_ROWS, device=chunks.device))
    return windows.permute(0, 3, 1, 2).flatten(0, 2).to(index_dtype(code.entries))


def solution_of(modules: Sequence[VQModule], problem: Problem) -> Solution:
    """What the layers of a group hold, as a solution of their stacked problem."""
    indices = torch.cat([windows_of(module)[:held] for module, held in zip(modules, problem.held, strict=True)])
    scales = [nn.functional.pad(m.scales, (0, held - m.rows)) for m, held in zip(modules, problem.held, strict=True)]
    return Solution(indices, modules[0].codebook.clone(), torch.cat(scales), 0.0)


def capped_descent(
    problem: Problem,
    start: Solution,
    damped: Tensor,
    factors: list[Tensor] | None,
    modules: Sequence[VQModule],
    options: RoundOptions,
) -> tuple[Solution, float]:
    """(the start after a descent that changes at most `options.cap` of its codes, the share that changed).

    The changes that gain most are the ones to keep: where too many codes change, a change must gain more, until the
    share is under the cap. Where no gain tried comes under it, none changes.
    """
    code = modules[0].code
    objective = Objective.of(problem, damped, factors)
    begin, settings = objective.loss(start.decode()), options.descent
    live = start.scales > 0
    for _ in range(CAP_TRIES + 1):
        found = descend(problem, start, code, damped, factors, settings)
        changes = (found.indices != start.indices)[live]
        share = float(changes.float().mean()) if changes.numel() else 0.0
        if share <= options.cap:
            return found, share
        # Twice the mean gain of those that changed, then twice as much again.
        unit = CHUNK_ROWS if code.window > code.shift else 1
        mean_gain = (begin - objective.loss(found.decode())) * unit / float(changes.sum())
        settings = replace(settings, least_gain=2 * max(settings.least_gain, mean_gain))
    return start, 0.0


def trusted_move(weight: Tensor, move: Tensor, moment: Tensor, code: VQCode) -> Tensor:
    """The move float32[m, n], no longer in the norm tr(· S ·ᵀ) than TRUST of the error that the code leaves of the
    weight Ŵ float32[m, n] before any feedback: as far as a quadratic model of the loss is believed (2.8).

    It binds where almost no loss reaches a layer, so that its Newton step is noise over noise. Without it a round on
    a model of random weights took the error of a tower's layers from 0.02 of their outputs to 1.4, by codebooks and
    scales that followed such steps; the divergence fell all the same.
    """
    limit = GAUSSIAN_ERROR[str(code)] * TRUST**2 * _energy(weight, moment)
    length = _energy(move, moment)
    return move if length <= limit else move * (limit / length) ** 0.5


def _energy(matrix: Tensor, moment: Tensor) -> float:
    return float(((matrix @ moment) * matrix).sum(dtype=torch.float64))


def moved_group(
    modules: Sequence[VQModule],
    targets: list[Tensor],
    moment: Tensor,
    row_factors: Sequence[Tensor | None],
    options: RoundOptions,
    *,
    is_shared: bool = False,
) -> tuple[tuple[VQWeights, ...], float]:
    """(the layers of a group coded again for W† float32[m_i, n], from what they hold; the share of codes that changed).

    Args:
        moment: S_i float32[n, n].
        row_factors: S_o float32[m_i, m_i] a layer; None where it has none. The identity where others have one.
        is_shared: other groups use the codebook too.
    """
    code = modules[0].code
    problem = stack_group(targets, moment, code, searches_paths=True)
    damped = factor_moment(problem.moment, problem.columns, code.vector, options.moment_damping).damped
    factors = _damped_factors(row_factors, problem.rows, options.dampings[0])
    found, share = capped_descent(problem, solution_of(modules, problem), damped, factors, modules, options)
    if options.refits:
        objective = Objective.of(problem, damped, factors)
        found = refit(problem, found, code, objective, keeps_codebook=options.keeps_codebook or is_shared)
    return pack_group(problem, found.indices, found.codebook, found.scales, code).layers, share


def _damped_factors(row_factors: Sequence[Tensor | None], rows: Sequence[int], damping: float) -> list[Tensor] | None:
    """S_o of every layer of a group, damped; None where no layer has one."""
    if all(factor is None for factor in row_factors):
        return None
    return [damp(torch.eye(m) if s is None else s, damping) for s, m in zip(row_factors, rows, strict=True)]
