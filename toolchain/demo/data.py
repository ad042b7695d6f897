"""Draw held-out pictures with questions: `python -m toolchain.demo.data -o FOLDER --pictures 50 --seed 101`.

Writes FOLDER/NAME.jsonl and FOLDER/NAME/*.png; each picture gets several questions of different kinds. The shipped
calibration and evaluation manifests are seeds 100 and 101 of this; training draws from other generators altogether.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from toolchain.demo import task


def write_manifest(folder: Path, name: str, pictures: int, questions: int, seed: int) -> Path:
    """Draw `pictures` pictures with up to `questions` distinct questions each; the manifest's path."""
    images = folder / name
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(pictures):
        rng = np.random.default_rng([seed, index])
        scene = task.random_scene(rng)
        file = images / f"{index:03d}.png"
        task.draw(scene, rng).save(file, optimize=True)
        asked: dict[str, str] = {}
        for _ in range(4 * questions):
            if len(asked) < questions:
                _, question, answer = task.ask(scene, rng)
                asked.setdefault(question, answer)
        for question, answer in asked.items():
            lines.append({"image": f"{name}/{file.name}", "prompt": question, "answer": answer})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--name", default="eval", help="manifest and image folder name")
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--questions", type=int, default=4, help="questions a picture")
    parser.add_argument("--seed", type=int, default=101)
    options = parser.parse_args()
    print(write_manifest(options.output, options.name, options.pictures, options.questions, options.seed))


if __name__ == "__main__":
    main()
