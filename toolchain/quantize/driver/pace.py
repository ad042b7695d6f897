"""How long a quantization still takes: by work done, not by layers, and silent until something has been timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from toolchain.values import LayerSpec, groups_of


def group_work(members: Iterable[LayerSpec]) -> float:
    """Multiplications of a group's feedback and of its moment's factors: Σ rows · columns² + columns³."""
    layers = list(members)
    return float(sum(spec.rows for spec in layers) * layers[0].columns ** 2 + layers[0].columns ** 3)


class LayerPace:
    """Seconds left of the sweep over a model's groups.

    The first group that is made is not timed: what comes before it is not its own. Groups that a run found finished say
    nothing of the pace. Forward passes grow with the model and not with a group, so that small groups seem slow.
    """

    def __init__(self, specs: Iterable[LayerSpec], clock: Callable[[], float] = time.monotonic) -> None:
        groups = groups_of(spec for spec in specs if not spec.tied_to)
        self._group_of = {spec.name: group for group, members in groups.items() for spec in members}
        self._waiting = {group: group_work(members) for group, members in groups.items()}
        self._clock, self._last = clock, clock()
        self._made, self._seconds, self._work = 0, 0.0, 0.0

    def after(self, layer: str, seconds: float) -> float | None:
        """Seconds that the layers after this one take, as far as is known; to be asked after every layer in turn.

        Args:
            seconds: that making it took, in this run or in the one that left it in the store.
        """
        now = self._clock()
        elapsed, self._last = now - self._last, now
        work = self._waiting.pop(self._group_of[layer], None)
        # A result from the store bears the seconds of the run that made it, which have not gone by in this one.
        if work is not None and elapsed >= seconds:
            self._made += 1
            if self._made > 1:
                self._seconds, self._work = self._seconds + elapsed, self._work + work
        if not self._work:
            return None
        return self._seconds / self._work * sum(self._waiting.values())
