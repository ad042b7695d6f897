"""Every matrix of the published models as C++: `python tests/layer_table.py > tests/plugins/kernels/layer_shapes.h`."""

from __future__ import annotations

from toolchain.bench.shapes import PUBLISHED, decoder_shape, matrix_shapes


def layer_shapes() -> dict[tuple[int, int], list[str]]:
    """(rows, columns) → what has that shape, fused groups as they run and the linears of a block on their own."""
    found: dict[tuple[int, int], list[str]] = {}
    for model in PUBLISHED:
        for name, shape in matrix_shapes(model).items():
            found.setdefault(shape, []).append(f"{model} {name}")
        for group in decoder_shape(model).groups:
            for rows in dict.fromkeys(group.rows):
                found.setdefault((rows, group.columns), []).append(f"{model} one of {group.name}")
    return dict(sorted(found.items()))


def header() -> str:
    """The C++ codebook."""
    lines = [f"    {{{rows}, {columns}}},  // {names[0]}" for (rows, columns), names in layer_shapes().items()]
    return "\n".join(
        [
            "// Every matrix of the published models (toolchain/bench/shapes.py). Generated, and compared by a test:",
            "//     python tests/layer_table.py > tests/plugins/kernels/layer_shapes.h",
            "#pragma once",
            "",
            "#include <cstdint>",
            "",
            "struct LayerShape {",
            "  int64_t rows, columns;",
            "};",
            "",
            "inline constexpr LayerShape kLayerShapes[] = {",
            *lines,
            "};",
            "",
        ]
    )


if __name__ == "__main__":
    print(header(), end="")
