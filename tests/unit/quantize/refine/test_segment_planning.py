"""Planning with segments: what is picked is run first, and the plan chooses among what was run."""

from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.bits.bitplan import plan as plan_bits
from toolchain.quantize.mgvq.bit_plan import CODES_OFFERED
from toolchain.quantize.mgvq.proxy import GAUSSIAN_ERROR, expected_loss, proxy_segments, quick
from toolchain.quantize.mgvq.sensitivity import Sensitivity
from toolchain.quantize.refine.segment_permutations import Ranking
from toolchain.quantize.refine.segment_planning import Planner
from toolchain.quantize.refine.segmentation import segment_units
from toolchain.values import LayerSpec, VQCode, parse_format
from toolchain.vq.interleave import interleaved_permutation
from toolchain.vq.segments import damped_square, quantize_segments
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import WORST, Options

SPECS = (
    LayerSpec("a", "language", "linear", 64, 192, "a", 0),
    LayerSpec("b", "vision", "linear", 64, 64, "b", 0),
)
WEIGHT, MOMENT = random_layer(64, 192, 0)
LOUD = torch.arange(192).flip(0)  # the highest-energy column last
# Units of "a" as loud as 200, 10 and 1; a single code has interleaved all of it at twice what cutting leaves.
UNITS = [2e-2, 1e-3, 1e-4]


def sensitivity(units=UNITS, **more) -> Sensitivity:
    total = 2 * sum(units)
    local = {"a": {c: total * GAUSSIAN_ERROR[c] / GAUSSIAN_ERROR["2,4,4"] for c in CODES_OFFERED}}
    local["b"] = {c: 1e-3 * GAUSSIAN_ERROR[c] for c in CODES_OFFERED}
    measured = {group: min(Sensitivity({}, {}, local).reference(group).values()) for group in local}
    local_units, losses = ({code: list(units) for code in ("2,4,4", "4,8,8")} for _ in range(2))
    reference = damped_square(WEIGHT, MOMENT, Options().damping)
    found = {"a": {"local": local_units, "losses": losses, "reference": reference}}
    return Sensitivity(measured, dict(measured), local, {}, found, **more)


def planner(bits: float, plans: list | None = None) -> Planner:
    def plan(losses):
        found = plan_bits(SPECS, {}, bits=bits, losses=losses)
        if plans is not None:
            plans.append((losses, found))
        return found

    return Planner(
        sensitivity(),
        {"a": Ranking(LOUD, torch.arange(192.0), ("a",))},
        lambda group: ([WEIGHT], MOMENT),
        plan,
        Options(),
        lambda group: torch.Generator().manual_seed(0),
        True,
    )


@pytest.mark.parametrize("bits", [1.7, 2.0, 2.5, 3.1])
def test_what_the_plan_picks_in_the_end_was_run(bits):
    plans: list = []
    one = planner(bits, plans)
    known = one.confirmed()
    assert set(known) == {"a"}
    final = plan_bits(
        SPECS, {}, bits=bits, losses={g: x | known.get(g, {}) for g, x in one.sensitivity.losses().items()}
    )
    layer = final.layer("a")
    if layer.segments:
        assert known["a"][layer.code] == one.confirm("a", layer.code, one.sensitivity.losses()["a"])
    assert any(plan.layer("a").segments for _, plan in plans), "cutting is worth it here: some plan picks it"
    assert final.index_bits() <= bits + 1e-9


TEXT = "2,6,8@64+2,4,8@64+2,3,8"


def run(text: str, order: torch.Tensor) -> list[float]:
    return proxy_segments(
        [WEIGHT[:, order]], MOMENT[order][:, order], text, quick(Options()), torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("belief", [1.0, 1.7])
def test_a_dry_run_that_loses_what_its_units_said_confirms_their_sum(belief):
    """In the currency of single codes: what the plan believes of the nearest one, over what a run of it says."""
    one = planner(2.0)
    rank = one.rankings["a"].banded
    units, lost = one.sensitivity.units["a"], run(TEXT, rank([64, 64, 64]))
    rates = [GAUSSIAN_ERROR[str(code)] / GAUSSIAN_ERROR["2,4,4"] for code, _ in segment_units(TEXT, 192)]
    units["local"]["2,4,4"][:] = [loss / units["reference"] / rate for loss, rate in zip(lost, rates)]
    nats = sum(UNITS) / (units["reference"] * sum(units["local"]["2,4,4"]))
    nearest = "2,4,8"  # of 13/6 bits a weight
    single = {"2,3,8": 1.0, nearest: belief * nats * sum(run(nearest, rank([192]))), "2,5,8": 1.0}
    expected = belief * sum(unit * rate for unit, rate in zip(UNITS, rates))
    assert one.confirm("a", TEXT, single) == pytest.approx(expected, rel=1e-5)


def test_a_dry_run_foretells_the_real_ones():
    """Short runs of narrow segments, whose codebooks fit far better than proxy codes would say: within a fourth."""
    order = interleaved_permutation(MOMENT.diagonal(), 4)
    weight, moment = WEIGHT[:, order], MOMENT[order][:, order]
    generator = torch.Generator().manual_seed(1)
    foretold = proxy_segments([weight], moment, TEXT, quick(Options()), generator)
    options = Options(rounds=2, lloyd_rounds=4, samples=4_000)
    real = quantize_segments([weight], moment, parse_format(TEXT, 192), options, generator).losses
    assert foretold == pytest.approx(real, rel=0.25)
    assert expected_loss(weight, moment, TEXT, Options(), generator) == pytest.approx(sum(real), rel=0.2)


def test_expected_loss_of_one_code_is_its_stand_ins():
    generator = torch.Generator().manual_seed(2)
    found = expected_loss(WEIGHT, MOMENT, "2,6,8", Options(), generator)
    plain = quantize_group([WEIGHT], MOMENT, VQCode(2, 4, 4), quick(Options()), torch.Generator().manual_seed(2)).loss
    assert found == pytest.approx(plain * GAUSSIAN_ERROR["2,6,8"] / GAUSSIAN_ERROR["2,4,4"])


def modal(text: float, image: float) -> dict[str, dict[str, float]]:
    return {"text": {"local": 0.1, "fisher": text}, "image": {"local": 0.1, "fisher": image}}


def test_the_average_of_modalities_is_what_was_measured():
    one = Sensitivity({"a": 4.0, "b": 2.0}, {}, {}, {"a": modal(3.0, 1.0), "b": modal(0.0, 0.0)})
    assert one.totals() == one.measured
    assert one.modal_shares("a") == {"text": 0.75, "image": 0.25}
    assert one.modal_shares("b") == {"text": 0.5, "image": 0.5}


def test_the_worst_modality_lifts_what_one_alone_needs():
    """By hand: text asks a for 3 and b for 1, mean 2; images for 1 and 9, mean 5."""
    one = Sensitivity({"a": 4.0, "b": 10.0}, {}, {}, {"a": modal(3.0, 1.0), "b": modal(1.0, 9.0)})
    assert one.totals(WORST) == pytest.approx({"a": 1.5, "b": 1.8})
