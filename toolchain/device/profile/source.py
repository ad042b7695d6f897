"""What to ask when nobody says, and what the latency model expects of it, from what a bundle carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from toolchain.bundle.manifest import Bundle
from toolchain.device.families.base import Host
from toolchain.device.generation.limits import limits_from_bundle
from toolchain.device.profile.measure import Question
from toolchain.device.profile.predict import geometry_from_plan, predict
from toolchain.device.profile.result import Machine, Prediction, Source
from toolchain.device.runtime.board import machine_name, read_board
from toolchain.plan.target import Target
from toolchain.values import BitPlan

FALLBACK_SIDE = 448  # pixels of a side where neither a plan nor the host limits an image


def noise_image(host_settings: Mapping[str, Any], bundle: Bundle | None) -> Image.Image:
    """An image of noise: square, as large as the bundle's memory plan and the host allow. The same every time."""
    side = FALLBACK_SIDE
    limit = host_settings["image"].get("max_pixels")
    if bundle is not None and "memory.json" in bundle.files:
        image = bundle.read_json("memory.json")["workload"]["image"]
        side = min(image) if image else side
    if limit is not None:
        side = min(side, int(limit**0.5))
    noise = np.random.default_rng(0).integers(0, 256, size=(side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def source_of(folder: Path, bundle: Bundle | None) -> Source:
    """What is profiled, and this machine. A bundle's folder may be called anything, so it goes by family and target."""
    name, digest = folder.resolve().name, None
    if bundle is not None:
        target = (bundle.manifest["target"] or {}).get("name", "no target")
        family = bundle.read_json("processor/host.json")["family"]
        name, digest = f"{family} for {target}", bundle.manifest["manifest_sha256"]
    board = read_board()
    return Source(name, digest, Machine(machine_name(), board.l4t, board.jetpack, board.cuda, board.gpu))


def check_question(bundle: Bundle, host: Host, question: Question, tokens: int) -> None:
    """Refuse a question that the bundle is not planned for, before it takes the machine's memory.

    Raises:
        InputDataError: the image is too large.
        BudgetError: prompt and `tokens` new tokens exceed the context.
    """
    limits, prepared = limits_from_bundle(bundle, host.settings), host.prepare(question.image, question.prompt)
    of_images = sum(end - start for start, end in prepared.image_places)
    if question.image_size is not None:
        limits.check_image("the image", question.image_size, of_images)
    limits.check_context(prepared.length, of_images, tokens)


def prediction_for(bundle: Bundle, host: Host, question: Question, backend: str, decoded: int) -> Prediction | None:
    """What the latency model says of a question on the bundle's target; None where the bundle has no plan or target.

    `same_device` is whether this is that board: it runs a Jetson release, its GPU has the target's compute capability,
    and the engines run on it.
    """
    if not {"bitplan.json", "target.json"} <= set(bundle.files):
        return None
    target = Target.from_json(bundle.read_json("target.json"))
    plan = BitPlan.from_json(bundle.read_json("bitplan.json"))
    prepared, settings = host.prepare(question.image, question.prompt), host.settings
    latency = predict(
        plan,
        geometry_from_plan(plan, settings),
        target,
        prompt_tokens=prepared.length,
        image_tokens=sum(end - start for start, end in prepared.image_places),
        image_size=question.image_size,
        max_pixels=settings["image"].get("max_pixels"),
        decoded=decoded,
    )
    board = read_board()
    same = board.l4t is not None and board.gpu is not None and board.gpu.sm == target.sm and backend != "ort"
    return Prediction(latency, same)
