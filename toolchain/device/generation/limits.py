"""What a bundle was planned for: the longest context, and the largest image in tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.bundle.manifest import Bundle
from toolchain.errors import BudgetError, InputDataError


@dataclass(frozen=True)
class Limits:
    """The most tokens of a context (images and answer included) and of one image; `planned_for` names the board."""

    context_tokens: int
    image_tokens: int | None
    planned_for: str

    def check_image(self, name: str, size: tuple[int, int], tokens: int) -> None:
        """Refuse an image of more tokens than planned.

        Raises:
            InputDataError: it has more.
        """
        if self.image_tokens is None or tokens <= self.image_tokens:
            return
        share = math.sqrt(self.image_tokens / tokens)
        width, height = (max(1, math.floor(side * share)) for side in size)
        raise InputDataError(
            f"{name} of {size[0]}x{size[1]} pixels takes {tokens} tokens; this bundle is planned for "
            f"{self.image_tokens} an image on {self.planned_for}: make it smaller, about {width}x{height}, or make "
            "the bundle again with a larger plan.image"
        )

    def check_context(self, prompt: int, images: int, new: int) -> None:
        """Refuse a prompt (its tokens, those of images among them) with an answer that would not fit.

        Raises:
            BudgetError: they exceed the context.
        """
        if prompt + new > self.context_tokens:
            raise BudgetError(
                f"prompt of {prompt} tokens ({images} of images) and up to {new} new ones exceed the context of "
                f"{self.context_tokens} planned for {self.planned_for}; shorten the prompt, start over (/reset in "
                "mgvq chat), use smaller images, ask for fewer new tokens (--max-new-tokens, or --tokens of mgvq "
                "profile), or make the bundle again with a larger plan.context"
            )


def limits_from_bundle(bundle: Bundle, settings: Mapping[str, Any]) -> Limits:
    """The limits of a bundle whose host.json has these settings: what the checkpoint, the engines' shapes and the
    memory plan allow together.
    """
    context = settings["decoder"]["max_context"]
    profiles = settings.get("profiles", {}).get("graphs", {})
    built = profiles.get("embed", {}).get("image_features")
    most = None if built is None else int(built[-1][0])
    plan = bundle.read_json("memory.json") if "memory.json" in bundle.files else None
    if plan is None:
        return Limits(context, most, "the checkpoint's own limits (the bundle has no memory plan)")
    workload, image = plan["workload"], plan["image"]
    context = min(context, workload["context_tokens"])
    if image is not None and not _covers_all(workload, settings):
        most = image["tokens"] if most is None else min(most, image["tokens"])
    return Limits(context, most, plan["target"])


def _covers_all(workload: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the plan's image is the largest square its pixel limit lets through and the host keeps that limit.

    An image of other sides may then take a few tokens more than the square, up to what the engines are built for.
    """
    image: Sequence[int] = workload["image"]
    limit = settings["image"].get("max_pixels")
    return limit is not None and limit <= workload["max_pixels"] and image[0] * image[1] >= math.isqrt(limit) ** 2
