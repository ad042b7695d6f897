"""Which layers share a table: those of a group, of a part, or all of every model; and what shared tables are called."""

from __future__ import annotations

from toolchain.errors import UsageError
from toolchain.values import LayerPlan, LayerSpec, VQCode

# A group's own table, trained on it; one a part and code, trained on samples of all its users; one a code, trained on
# Gaussian samples once and for all (`vq.universal`).
GROUP, PART, UNIVERSAL = "group", "part", "universal"
CHOICES = (GROUP, PART, UNIVERSAL)


def check_choice(tables: str) -> None:
    """Refuse what is none of CHOICES."""
    if tables not in CHOICES:
        raise UsageError(f"tables {tables!r}: expected one of {', '.join(CHOICES)}")


def table_owner(tables: str, spec: LayerSpec) -> str | None:
    """Whose tables a layer that stores codes uses: its part's, or "universal"; None where its group has its own."""
    return {GROUP: None, PART: spec.part, UNIVERSAL: UNIVERSAL}[tables]


def shared_table_id(owner: str, code: VQCode) -> str:
    """The id of an owner's table of a code, such as language_2_4_8."""
    return f"{owner}_{code.vector}_{code.shift}_{code.window}"


def table_in(layer: LayerPlan, code: VQCode) -> str:
    """The id of a layer's table once all of it is in another code: its owner's of that code, or the group's own."""
    first = layer.pieces[0]
    mark = shared_table_id("", first.vq_code)
    return shared_table_id(first.table.removesuffix(mark), code) if first.table.endswith(mark) else layer.table
