"""How long a quantization still takes: by work done, not by layers, and silent until something has been timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from toolchain.reporter import Reporter
from toolchain.sequence import LayerResult, groups_of
from toolchain.values import LayerSpec


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

    def after(self, layer: LayerResult) -> float | None:
        """Seconds that the layers after this one take, as far as is known; to be asked after every layer in turn."""
        now = self._clock()
        elapsed, self._last = now - self._last, now
        work = self._waiting.pop(self._group_of[layer.name], None)
        # A result from the store bears the seconds of the run that made it, which have not gone by in this one.
        if work is not None and elapsed >= layer.seconds:
            self._made += 1
            if self._made > 1:
                self._seconds, self._work = self._seconds + elapsed, self._work + work
        if not self._work:
            return None
        return self._seconds / self._work * sum(self._waiting.values())


def layer_progress(report: Reporter, specs: Iterable[LayerSpec]) -> Callable[[LayerResult, int, int], None]:
    """What a quantization of these layers is to call after every one, so that the reporter hears the time left."""
    pace = LayerPace(specs)
    return lambda layer, done, total: report.layer(done, total, layer.name, pace.after(layer))
