"""Codebooks for every model: trained once on Gaussian samples, kept beside this file, and the same bytes for everyone.

Weights at unit row scale are nearly Gaussian where nothing stands out. Where single weights do, such a codebook is far
worse than one trained on them: on two of six matrices of a real encoder 2.6 and 8.5 times the error of trained
codebooks, on the other four 2 to 4 % more. A rotation takes the difference away (all but 4 %).

Generated, in about two minutes, by `python -m toolchain.vq.universal_codebooks`, which overwrites the file.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from toolchain.errors import InputDataError
from toolchain.values import CODES, VQCode
from toolchain.vq.codebook import Samples, round_codebook
from toolchain.vq.solve import train_samples
from toolchain.vq.weights import FixedCodebook

FILE = Path(__file__).with_name("universal.safetensors")
STEPS, MACHINE = "steps", "machine"  # metadata keys inside the one that the file has
# The codes of checkpoints, and the one that stands in for pairs in proxy quantizations
# (`toolchain.quantize.mgvq.proxy`).
TRAINED_CODES = (*CODES.values(), VQCode(2, 4, 4))
# Error on other Gaussian samples: (2,4,8) 0.0809, (4,8,8) 0.0982, (2,6,8) 0.0230. With 12 rounds 0.0818, 0.0993,
# 0.0234; with 40 rounds of half the samples 0.0819, 0.0988, 0.0233.
SAMPLES = 1 << 17
ROUNDS = 40
SEED = 0


def gaussian_codebook(code: VQCode) -> FixedCodebook:
    """The code's codebook for weights that are N(0, 1) at unit row scale, errors counting alike, as it is stored."""
    generator = torch.Generator().manual_seed(SEED)
    vectors = torch.randn(SAMPLES, code.vector, generator=generator)
    samples = Samples(vectors, torch.eye(code.vector).expand(SAMPLES, -1, -1))
    stored, step = round_codebook(*train_samples(samples, code, ROUNDS, generator), code)
    return FixedCodebook(stored.contiguous(), step)


@cache
def universal_codebooks() -> dict[VQCode, FixedCodebook]:
    """Code → its codebook, of all TRAINED_CODES, from the file.

    Raises:
        InputDataError: the file lacks one, or one is not what its code demands.
    """
    steps = stored_metadata()[STEPS]
    found = {}
    with safe_open(FILE, framework="pt") as file:
        for code in TRAINED_CODES:
            codebook = file.get_tensor(str(code)) if str(code) in steps else torch.empty(0)
            if codebook.shape != (code.entries, code.vector) or codebook.dtype != getattr(torch, code.codebook_dtype):
                raise InputDataError(
                    f"{FILE}: expected {code.codebook_dtype}[{code.entries}, {code.vector}] under {code}, found "
                    f"{codebook.dtype}{list(codebook.shape)}; run python -m toolchain.vq.universal_codebooks"
                )
            found[code] = FixedCodebook(codebook, steps[str(code)])
    return found


def stored_metadata() -> dict:
    """{"steps": code → step, "machine": what the file was made with}."""
    with safe_open(FILE, framework="pt") as file:
        return json.loads(file.metadata()["mgvq"])


def machine() -> dict[str, str | int]:
    """What sums of floats depend on, besides the program."""
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    torch.set_num_threads(1)
    codebooks = {str(code): gaussian_codebook(code) for code in TRAINED_CODES}
    made = {STEPS: {name: one.step for name, one in codebooks.items()}, MACHINE: machine()}
    # One key, since safetensors writes several in random order.
    save_file({name: one.stored for name, one in codebooks.items()}, FILE, metadata={"mgvq": json.dumps(made)})
    print(f"{FILE}: {len(codebooks)} codebooks")


if __name__ == "__main__":
    main()
