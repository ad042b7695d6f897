"""Which layers share a codebook: those of a group, of a part, or all of every model; and what shared codebooks are
called.
"""

from __future__ import annotations

from toolchain.errors import UsageError
from toolchain.values import LayerPlan, LayerSpec, VQCode

# A group's own codebook, trained on it; one a part and code, trained on samples of all its users; one a code, trained
# on Gaussian samples once and for all (`vq.universal_codebooks`).
GROUP, PART, UNIVERSAL = "group", "part", "universal"
CHOICES = (GROUP, PART, UNIVERSAL)


def check_choice(codebooks: str) -> None:
    """Refuse what is none of CHOICES."""
    if codebooks not in CHOICES:
        raise UsageError(f"codebooks {codebooks!r}: expected one of {', '.join(CHOICES)}")


def codebook_owner(codebooks: str, spec: LayerSpec) -> str | None:
    """Whose codebooks a layer that stores codes uses: its part's, or "universal"; None where its group has its own."""
    return {GROUP: None, PART: spec.part, UNIVERSAL: UNIVERSAL}[codebooks]


def shared_codebook_id(owner: str, code: VQCode) -> str:
    """The id of an owner's codebook of a code, such as language_2_4_8."""
    return f"{owner}_{code.vector}_{code.shift}_{code.window}"


def codebook_in(layer: LayerPlan, code: VQCode) -> str:
    """The id of a layer's codebook once all of it is in another code: its owner's of that code, or the group's own."""
    first = layer.pieces[0]
    mark = shared_codebook_id("", first.vq_code)
    return shared_codebook_id(first.table.removesuffix(mark), code) if first.table.endswith(mark) else layer.table
