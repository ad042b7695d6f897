"""The tables of parts: trained before the sweep, from the full-precision model, for the codes that the plan gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from toolchain.bits.codebook_sharing import PART
from toolchain.calibration.activations import Masses, collect_pairs
from toolchain.files.store import ObjectStore
from toolchain.quantize.driver.request import Job
from toolchain.quantize.driver.sequence import group_generator
from toolchain.quantize.mgvq.proxy import row_weights_of
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.mgvq.sensitivity import moment_stretches
from toolchain.quantize.mgvq.sweep import group_moment
from toolchain.values import BitPlan, LayerSpec, Progress, groups_of, parse_format
from toolchain.vq.drift import PairMoments
from toolchain.vq.shared_codebooks import Pool, pieces_of
from toolchain.vq.weights import FixedTable

SAMPLES = 4  # times as many as a group's own table trains on


def shared_tables(run: MgvqRun, plan: BitPlan, masses: Masses) -> dict[str, FixedTable]:
    """Table id → the table, of those that the groups of a part share; none unless the recipe has parts own them."""
    if run.recipe.tables != PART:
        return {}
    return train_part_tables(run.job, plan, masses, run.store, run.progress)


def train_part_tables(
    job: Job, plan: BitPlan, masses: Masses, store: ObjectStore, progress: Progress
) -> dict[str, FixedTable]:
    """Table id → the table, of every part and code of the plan, kept in the store.

    A table is trained on all groups and segments of its part that the plan gives its code; the others will not use
    it. What is random is drawn from the job's seed and the names of groups and tables.

    Args:
        job: its model in full precision, with the column orders that the sweep will meet.
        plan: whose tables parts own (`bitplan.plan`).
    """

    def make() -> tuple[dict[str, Tensor], Any]:
        pools = _drawn(job, plan, masses, progress)
        found = {}
        for done, (name, pool) in enumerate(pools.items(), start=1):
            found[name] = pool.table(job.options, group_generator(job.seed, f"table.{name}"))
            progress.step(done, len(pools), "codebooks")
        return {n: one.stored for n, one in found.items()}, {n: one.step for n, one in found.items()}

    tables, steps = store.made("tables", make)
    return {name: FixedTable(stored, steps[name]) for name, stored in tables.items()}


def _drawn(job: Job, plan: BitPlan, masses: Masses, progress: Progress) -> dict[str, Pool]:
    """Table id → samples of all that uses it."""
    pools = _pools(plan)
    stored = [spec for spec in job.specs if not spec.tied_to]
    done = 0
    for stretch in moment_stretches(stored):
        pairs = _pairs(job, stretch, masses)
        for group, members in groups_of(stretch).items():
            _draw_group(job, plan, members, pairs.get(group), pools)
            done += len(members)
            progress.step(done, len(stored), "codebook samples")
    return pools


def _pools(plan: BitPlan) -> dict[str, Pool]:
    """Table id → an empty pool that knows how many weights will use the table."""
    pools: dict[str, Pool] = {}
    for piece in (piece for layer in plan.layers if not layer.tied_to for piece in layer.pieces):
        pools.setdefault(piece.table, Pool(piece.vq_code, 0)).weights += piece.rows * piece.columns
    return pools


def _pairs(job: Job, stretch: Sequence[LayerSpec], masses: Masses) -> Mapping[str, PairMoments]:
    """Group → moments of its full-precision inputs; an embedding's are those of the head that is tied to it."""
    groups = {spec.group for spec in stretch}
    asked = [spec for spec in job.specs if spec.group in groups and spec.kind != "embedding"]
    return collect_pairs(job.model, None, job.inputs, asked, masses) if asked else {}


def _draw_group(
    job: Job, plan: BitPlan, members: Sequence[LayerSpec], pairs: PairMoments | None, pools: Mapping[str, Pool]
) -> None:
    """Add what a group's layers give to the pools of their tables."""
    spec = members[0]
    weights = [job.model.get_parameter(f"{s.name}.weight").detach().flatten(1).float() for s in members]
    moment = group_moment(spec, pairs).to(weights[0])
    rows = [row_weights_of(spec, weight) for weight in weights] if spec.kind == "embedding" else None
    layer = plan.layer(spec.name)
    pieces = pieces_of(weights, moment, parse_format(layer.code, spec.columns), job.options.damping, rows)
    for number, (planned, piece) in enumerate(zip(layer.pieces, pieces, strict=True)):
        generator = group_generator(job.seed, f"samples.{spec.group}.{number}")
        pools[planned.table].add(piece, SAMPLES * job.options.samples, generator)
