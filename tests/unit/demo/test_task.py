"""The drawn task: answers agree with the scene they are about, and pictures come in the sizes they should."""

from __future__ import annotations

import numpy as np
import pytest

from toolchain.demo import task
from toolchain.demo.task import Scene, Thing

RED_CIRCLE, BLUE_SEVEN, RED_STAR = Thing("circle", "red"), Thing("7", "blue"), Thing("star", "red")
SCENE = Scene(((RED_CIRCLE, None), (BLUE_SEVEN, RED_STAR)))


class Scripted:
    """A generator whose `integers` answers from a list, to force one particular question."""

    def __init__(self, *values: int) -> None:
        self._values = list(values)

    def integers(self, *_args, **_kwargs) -> int:
        return self._values.pop(0)

    def random(self) -> float:
        return 0.0


def test_answers_worked_by_hand():
    assert task.read_all(SCENE, Scripted()) == ("Read the picture.", "red circle, nothing / blue 7, red star")
    assert task.read_row(SCENE, Scripted(1)) == ("Read row 2.", "blue 7, red star")
    assert task.read_cell(SCENE, Scripted(0, 1)) == ("What is in row 1, column 2?", "nothing")
    assert task.where(SCENE, Scripted(1)) == ("Where is the blue 7?", "row 2, column 1")
    assert task.count_color(SCENE, Scripted(1)) == ("How many red things are there?", "2")
    assert task.kind_of(SCENE, Scripted(0)) == ("What is the blue thing?", "7")
    # direction 2 is "above"; only the two things of the lower row have a cell above them
    assert task.beside(SCENE, Scripted(2, 1)) == ("What is above the red star?", "nothing")


@pytest.mark.parametrize("seed", range(20))
def test_existence_questions_are_true(seed):
    rng = np.random.default_rng(seed)
    scene = task.random_scene(rng)
    present = {str(thing) for _, _, thing in scene.things()}
    question, answer = task.exists(scene, rng)
    asked = question.removeprefix("Is there a").removeprefix("n").strip(" ?")
    assert (asked in present) == (answer == "yes")


def test_same_generator_same_picture_and_sizes_vary():
    def picture(seed):
        rng = np.random.default_rng(seed)
        return task.draw(task.random_scene(rng), rng)

    assert picture(3).tobytes() == picture(3).tobytes()
    assert len({picture(seed).size for seed in range(30)}) > 10


def test_every_kind_can_be_drawn():
    rng = np.random.default_rng(0)
    for kind in task.SHAPES + task.DIGITS:
        image = task.draw(Scene(((Thing(kind, "red"),),)), rng, cell_pixels=28)
        red = np.asarray(image, dtype=int)
        assert ((red[..., 0] - red[..., 2]) > 80).sum() > 20, kind


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no drawing for kind 'blob'"):
        task.draw(Scene(((Thing("blob", "red"),),)), np.random.default_rng(0))
