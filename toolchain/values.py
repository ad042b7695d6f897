"""Values handed from stage to stage: frozen, JSON-clean, and light (standard library only).

Shapes are (rows, columns) = (outputs, inputs) of a weight matrix throughout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from toolchain.errors import UnsupportedError

ROW_GROUP = 128  # rows are padded to this; a chunk takes 16 of them, 8 apart
COLUMN_GROUP = 16  # columns are padded to this
CHUNK_ROWS = 16
ROW_STRIDE = 8  # distance of neighbouring rows of one chunk; also the number of chunks that share a row group
FORMAT_VERSION = 1


@dataclass(frozen=True)
class VQCode:
    """A weight code (V, k, L): V weights a lookup, k stream bits a lookup, L window bits. Index bits a weight: k / V.

    `L == k` is a plain codebook; `L > k` overlaps neighbouring windows inside a chunk.
    """

    vector: int
    shift: int
    window: int

    def __post_init__(self) -> None:
        legal = self.vector in (2, 4) and 1 <= self.shift <= 8 and self.shift <= self.window <= 9
        if not legal:
            raise UnsupportedError(
                f"code {self}: expected V in (2, 4), k in 1..8 and k <= L <= 9; use one of {sorted(CODE_NAMES)}"
            )

    def __str__(self) -> str:
        return f"{self.vector},{self.shift},{self.window}"

    @classmethod
    def parse(cls, text: str) -> VQCode:
        """The code written "V,k,L".

        Raises:
            UnsupportedError: not three integers, or not a legal code.
        """
        try:
            vector, shift, window = (int(part) for part in text.split(","))
        except ValueError:
            raise UnsupportedError(f"code {text!r}: expected three integers V,k,L such as 4,8,8") from None
        return cls(vector, shift, window)

    @property
    def index_bits(self) -> float:
        """Index bits a weight."""
        return self.shift / self.vector

    @property
    def entries(self) -> int:
        """Table entries, 2**L."""
        return 1 << self.window

    @property
    def codebook_dtype(self) -> str:
        """An entry is 4 bytes: int8 quads, whose step is folded into the row scale, or float16 pairs."""
        return "int8" if self.vector == 4 else "float16"

    @property
    def codebook_bytes(self) -> int:
        return 4 * self.entries

    @property
    def chunk_bytes(self) -> int:
        return CHUNK_ROWS * self.shift // 8

    def padded_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """(rows, columns) after padding to whole chunks."""
        return -(-rows // ROW_GROUP) * ROW_GROUP, -(-columns // COLUMN_GROUP) * COLUMN_GROUP

    def chunk_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """(row groups R, chunks a row group along rows = 8, chunks along columns C) of a padded matrix."""
        padded_rows, padded_columns = self.padded_shape(rows, columns)
        return padded_rows // ROW_GROUP, ROW_STRIDE, padded_columns // self.vector

    def codes_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed codes of a matrix, padding included."""
        row_groups, stride, column_chunks = self.chunk_shape(rows, columns)
        return row_groups * stride * column_chunks * self.chunk_bytes


PLAIN_CODE_NAMES = ("4,8,8", "2,6,6", "2,8,8")
CODE_NAMES = (*PLAIN_CODE_NAMES, "2,3,8", "2,4,8", "2,5,8", "2,6,8", "2,8,9", "4,8,9")
CODES: dict[str, VQCode] = {name: VQCode.parse(name) for name in CODE_NAMES}

PARTS = ("language", "vision", "projector", "embedding", "head")

SEGMENT_STEP = 64  # boundaries of K-segments are multiples of it
MOST_SEGMENTS = 3


@dataclass(frozen=True)
class Segment:
    """Columns first … first + columns − 1 of a layer, in a code of their own."""

    first: int
    columns: int
    code: VQCode


def parse_format(text: str, columns: int) -> tuple[Segment, ...]:
    """The K-segments of a layer of so many columns, first to last; one segment where the text is one code.

    "2,4,8" is one code; "2,6,8@64+2,4,8@128+2,3,8" gives columns 0-63, 64-191, and the rest.

    Raises:
        UnsupportedError: not such a text, more than MOST_SEGMENTS segments, a boundary that is no multiple of
            SEGMENT_STEP, or no column left for the last segment.
    """
    parts = [part.partition("@") for part in text.split("+")]
    widths = [width for _, _, width in parts[:-1]]
    legal = len(parts) <= MOST_SEGMENTS and not parts[-1][1] and all(width.isdecimal() for width in widths)
    counts = [int(width) for width in widths] if legal else []
    left = columns - sum(counts)
    if not legal or left < 1 or any(count < 1 or count % SEGMENT_STEP for count in counts):
        raise UnsupportedError(
            f"format {text!r} of a layer of {columns} columns: expected a code V,k,L, or at most {MOST_SEGMENTS} codes "
            f"with the columns of all but the last, such as 2,6,8@64+2,4,8, in multiples of {SEGMENT_STEP} and fewer "
            "than the layer has; change the plan or the override"
        )
    counts.append(left)
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    codes = [VQCode.parse(code) for code, _, _ in parts]
    return tuple(Segment(*segment) for segment in zip(firsts, counts, codes))


def format_text(segments: Sequence[tuple[int, str]]) -> str:
    """The text of (columns, code) pairs, first to last: what `parse_format` reads."""
    *others, (_, last) = segments
    return "+".join([*(f"{code}@{columns}" for columns, code in others), last])


@dataclass(frozen=True)
class LayerSpec:
    """One quantizable weight of a model: what it is called, where it stands, what shares its input.

    `kind` is "linear", "conv" (a convolution whose stride is its kernel: a linear over flattened patches) or
    "embedding". Layers of one `group` read the same input and run as one node: they share code and table. `tied_to`
    names the layer whose codes this one uses. `order` is the step of the sequential sweep that quantizes it.
    """

    name: str
    part: str
    kind: str
    rows: int
    columns: int
    group: str
    order: int
    has_bias: bool = False
    tied_to: str | None = None


def groups_of(specs: Iterable[LayerSpec]) -> dict[str, list[LayerSpec]]:
    """Group → members, in order."""
    groups: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.group, []).append(spec)
    return groups


@dataclass(frozen=True)
class LayerPlan:
    """The format one layer gets. `table` is the id of its table, which other layers may share; `code` is "V,k,L".

    A layer in K-segments has the text of `parse_format` there, and a table a segment: ids joined by "+", or one id,
    whose segments' are then ID_0, ID_1 and so on. `pieces` are what is stored.
    `rotation` is the block of the rotation that its inputs go through first (`vq.rotation`), 0 for none.
    """

    name: str
    part: str
    kind: str
    rows: int
    columns: int
    group: str
    code: str
    table: str
    tied_to: str | None = None
    rotation: int = 0

    @property
    def vq_code(self) -> VQCode:
        """The code of a layer that has one.

        Raises:
            UnsupportedError: the layer is in K-segments.
        """
        return VQCode.parse(self.code)

    @property
    def segments(self) -> tuple[LayerPlan, ...]:
        """Its K-segments as layers of their own, NAME.segments.0 and so on; empty where the layer has one code."""
        if "+" not in self.code:
            return ()
        segments = parse_format(self.code, self.columns)
        tables = self.table.split("+")
        if len(tables) == 1:
            tables = [f"{self.table}_{number}" for number in range(len(segments))]
        return tuple(
            replace(
                self,
                name=f"{self.name}.segments.{number}",
                columns=segment.columns,
                code=str(segment.code),
                table=table,
            )
            for number, (segment, table) in enumerate(zip(segments, tables, strict=True))
        )

    @property
    def pieces(self) -> tuple[LayerPlan, ...]:
        """What holds codes, table and scales: its segments, or the layer itself."""
        return self.segments or (self,)

    @property
    def index_bits(self) -> float:
        """Index bits a weight, averaged over its columns."""
        return sum(piece.columns * piece.vq_code.index_bits for piece in self.pieces) / self.columns

    @property
    def codes_bytes(self) -> int:
        """0 for a tied layer: its codes are stored once, under the other name."""
        if self.tied_to:
            return 0
        return sum(piece.vq_code.codes_bytes(piece.rows, piece.columns) for piece in self.pieces)

    @property
    def scales_bytes(self) -> int:
        return 0 if self.tied_to else 2 * self.rows * len(self.pieces)


@dataclass(frozen=True)
class BitPlan:
    """A format for every quantized layer, and every byte that stays in 16 bits by name.

    `kept` maps tensor names (norms, biases, whatever is left) to their element counts; kept tensors are 2 bytes each.
    """

    layers: tuple[LayerPlan, ...]
    kept: dict[str, int] = field(default_factory=dict)
    requested_bits: float | None = None

    def layer(self, name: str) -> LayerPlan:
        """The layer, or the segment of one, of that name."""
        return next(one for layer in self.layers for one in (layer, *layer.segments) if one.name == name)

    def codebooks(self) -> dict[str, VQCode]:
        """Table id → the code whose table it is."""
        return {piece.table: piece.vq_code for layer in self.layers for piece in layer.pieces}

    def index_bits(self, parts: tuple[str, ...] = PARTS) -> float:
        """Index bits averaged over the quantized weights of `parts` (what papers quote); 0 where there are none."""
        stored = [x for x in self.layers if x.part in parts and not x.tied_to]
        weights = sum(x.rows * x.columns for x in stored)
        return sum(x.rows * x.columns * x.index_bits for x in stored) / weights if weights else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BitPlan:
        layers = tuple(LayerPlan(**layer) for layer in data["layers"])
        return cls(layers, dict(data["kept"]), data.get("requested_bits"))


ANSWER_TOKENS = 64  # of the answers that calibration lines without one get from the model, unless said otherwise


@dataclass(frozen=True)
class Sample:
    """One image and one question of a manifest; `answer` is None where the line had none. `image` is absolute."""

    image: Path
    prompt: str
    answer: str | None = None


class Progress(Protocol):
    """Told how work comes on: stages, steps that are alike, layers, which are not, and what a user should know."""

    def stage(self, title: str) -> None: ...
    def step(self, done: int, total: int, what: str = "") -> None: ...
    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None: ...
    def note(self, text: str) -> None: ...
    def done(self, summary: str) -> None: ...


class Silent:
    """A progress that says nothing; to be overridden by one that listens to a part of it."""

    def stage(self, title: str) -> None:
        """Nothing."""

    def step(self, done: int, total: int, what: str = "") -> None:
        """Nothing."""

    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def done(self, summary: str) -> None:
        """Nothing."""


SILENT: Progress = Silent()
