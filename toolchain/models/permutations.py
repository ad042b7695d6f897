"""Column permutations that cost nothing: where columns may be permuted because whatever produces them can be permuted
too.

A family names its free permutations; a driver measures energies, interleaves an order for each and folds it into the
parameters:

    free = family.free_permutations(config)
    permutations = {f.name: interleaved(f, combined_energies(f, diagonals), vector=4) for f in free}
    apply_permutations(model, permutations, free)          # the same function, other columns

An order says `order[new] = old` throughout. q and k keep theirs: rotary embedding ties their rows in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.errors import NumericGateError, ShapeError
from toolchain.models.configs import Config, head_dim
from toolchain.values import LayerSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """One axis of one parameter that stands in an order, from index `start` to the axis' end.

    Each unit of the order is there `repeats` times, one copy after another:

        unit = head, repeats = 2 query heads a KV head    | head 0 | head 0 | head 1 | head 1 |
        unit = everything, repeats = 4 neighbours         | order | order | order | order |
    """

    parameter: str
    axis: int
    start: int = 0
    repeats: int = 1


@dataclass(frozen=True)
class FreePermutation:
    """One order that can be chosen: what reads columns in it, and every place that has to follow.

    `size` indices, which stay inside consecutive units of `unit` (`unit == size`: any permutation). `readers` are
    quantizable layers whose columns are in this order; a reader has `size * repeats` columns, `repeats` of its place.
    `places` holds readers and producers alike. A tied embedding and head are two places of one parameter.
    """

    name: str
    size: int
    unit: int
    readers: tuple[str, ...]
    places: tuple[Place, ...]

    def reader_place(self, reader: str) -> Place:
        """Where the columns of a reader's weight are.

        Raises:
            ShapeError: the layer does not read this order.
        """
        for place in self.places:
            if reader in self.readers and (place.parameter, place.axis) == (f"{reader}.weight", 1):
                return place
        raise ShapeError(f"order {self.name}: expected one of its readers {list(self.readers)}, found {reader!r}")


def columns_of(layer: str, repeats: int = 1) -> Place:
    """The columns of a layer that reads an order."""
    return Place(f"{layer}.weight", 1, 0, repeats)


def rows_of(spec: LayerSpec, start: int = 0) -> tuple[Place, ...]:
    """The rows from `start` on, and the bias if there is one, of a layer that produces an order."""
    names = ("weight", "bias") if spec.has_bias else ("weight",)
    return tuple(Place(f"{spec.name}.{name}", 0, start) for name in names)


def norm_of(module: str, has_bias: bool, repeats: int = 1) -> tuple[Place, ...]:
    """Weight and bias of a norm over columns in an order; what it divides by does not depend on the order."""
    names = ("weight", "bias") if has_bias else ("weight",)
    return tuple(Place(f"{module}.{name}", 0, 0, repeats) for name in names)


def free_permutation(
    name: str, size: int, readers: Sequence[Place], producers: Iterable[Place], unit: int | None = None
) -> FreePermutation:
    """The order of these readers (see `columns_of`) and producers; free in everything unless a unit is given."""
    names = tuple(place.parameter.removesuffix(".weight") for place in readers)
    return FreePermutation(name, size, unit or size, names, (*readers, *producers))


def decoder_permutations(
    text: Config, specs: Mapping[str, LayerSpec], decoder: str, embedding: str, head: str, feeder: str
) -> list[FreePermutation]:
    """The permutations of a Llama-shaped decoder: its residual stream, then v/o inside heads and MLP hidden, block by
    block.

    Args:
        text: the decoder's part of the config.
        specs: the model's quantizable layers by name.
        decoder: the module that holds `layers` and `norm`.
        feeder: the layer whose outputs stand in for image tokens: it writes the residual stream too.
    """
    readers, producers = [columns_of(embedding), columns_of(head)], [*rows_of(specs[feeder])]
    producers += norm_of(f"{decoder}.norm", False)
    inside = []
    unit, keys = head_dim(text), text["num_key_value_heads"]
    for index in range(text["num_hidden_layers"]):
        block = f"{decoder}.layers.{index}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        read = [f"{attention}.{x}_proj" for x in "qkv"] + [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        readers += [columns_of(layer) for layer in read]
        for layer in (f"{attention}.o_proj", f"{mlp}.down_proj"):
            producers += rows_of(specs[layer])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            producers += norm_of(f"{block}.{norm}", False)
        shared = columns_of(f"{attention}.o_proj", text["num_attention_heads"] // keys)
        inside.append(free_permutation(attention, keys * unit, [shared], rows_of(specs[f"{attention}.v_proj"]), unit))
        hidden = [*rows_of(specs[f"{mlp}.gate_proj"]), *rows_of(specs[f"{mlp}.up_proj"])]
        inside.append(free_permutation(mlp, text["intermediate_size"], [columns_of(f"{mlp}.down_proj")], hidden))
    return [free_permutation(f"{decoder}.residual", text["hidden_size"], readers, producers), *inside]


def combined_energies(
    free: FreePermutation, diagonals: Mapping[str, Tensor], weights: Mapping[str, float] | None = None
) -> Tensor:
    """Energies float32[size] of a free permutation: each reader's diag H divided by its mean, then averaged.

    Columns that share one index of the order (query heads of a KV head, the neighbours a merger reads side by side)
    are averaged first. An embedding has no inputs to weigh: give it a constant diagonal, which moves no rank.

    Args:
        diagonals: reader → float[columns], in the order the model has now.
        weights: reader → weight in the average; 1 where not given, and a reader of weight 0 needs no diagonal.

    Raises:
        ShapeError: a reader has no diagonal, or one of the wrong length; or all weights are 0, or one is negative.
        NumericGateError: a diagonal's mean is not a positive number.
    """
    import torch

    given = {reader: 1.0 if weights is None else weights.get(reader, 1.0) for reader in free.readers}
    used = {reader: weight for reader, weight in given.items() if weight != 0}
    if not used or min(used.values()) < 0:
        raise ShapeError(f"order {free.name}: expected weights of at least 0, one of them larger, found {given}")
    total = torch.zeros(free.size)
    for reader, weight in used.items():
        repeats = free.reader_place(reader).repeats
        diagonal = diagonals.get(reader)
        if diagonal is None or diagonal.shape != (free.size * repeats,):
            found = "none" if diagonal is None else list(diagonal.shape)
            raise ShapeError(
                f"order {free.name}: expected {free.size * repeats} energies for {reader}, found {found}; collect its "
                "second moment, or give it weight 0"
            )
        mean = float(diagonal.double().mean())
        if not 0 < mean < float("inf"):
            raise NumericGateError(
                f"layer {reader}: expected energies with a positive mean, found {mean:g}; look for overflow in the "
                "activations, or inputs that never reach this layer"
            )
        shared = (diagonal.float().cpu() / mean).reshape(-1, repeats, free.unit).mean(dim=1)
        total += weight * shared.reshape(-1)
    return total / sum(used.values())


def interleaved(free: FreePermutation, energies: Tensor, vector: int) -> Tensor:
    """The interleaved permutation int64[size] (`toolchain.vq.interleave`) of a free permutation, each unit interleaved
    on its own.

    Raises:
        ShapeError: the unit is not a multiple of `vector`, or there are not `size` energies.
        NumericGateError: an energy is not finite.
    """
    import torch

    from toolchain.vq.interleave import interleave_units

    if energies.shape != (free.size,):
        raise ShapeError(f"order {free.name}: expected {free.size} energies, found shape {list(energies.shape)}")
    local = interleave_units(energies.reshape(-1, free.unit), vector)
    return (local + free.unit * torch.arange(len(local), device=local.device)[:, None]).reshape(-1)


def column_permutation(free: FreePermutation, reader: str, order: Tensor) -> Tensor:
    """int64[columns] of a reader: the old column that each new one was. W_new = W[:, it], H_new = H[it][:, it].

    Raises:
        ShapeError: the layer does not read this order, or `order` is not a permutation inside its units.
    """
    return _expanded(_checked(free, order), free.unit, free.reader_place(reader).repeats)


def apply_permutations(
    model: nn.Module, permutations: Mapping[str, Tensor], free_permutations: Iterable[FreePermutation]
) -> None:
    """Permute a dense model's parameters in place so that every named order is the one given; outputs do not change.

    Parameters keep their identity and ties. Orders that are not named stay. Everything is checked before anything is
    moved.

    Args:
        permutations: name of a free permutation → int64[size], `order[new] = old`.

    Raises:
        ShapeError: an unknown name, not a permutation inside the units, or a model that has not the parameters or
            shapes that the free permutation names, or has a bias that it does not name.
    """
    import torch

    known = {free.name: free for free in free_permutations}
    unknown = sorted(set(permutations) - set(known))
    if unknown:
        raise ShapeError(f"expected permutations among {sorted(known)}, found {unknown}")
    chosen = [(known[name], _checked(known[name], order)) for name, order in permutations.items()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for free, _ in chosen:
        _check_places(free, parameters)
    moved = set()
    with torch.no_grad():
        for free, order in chosen:
            for place in free.places:
                parameter = parameters[place.parameter]
                # A tied parameter is at two places and must be moved once.
                key = (id(parameter), place.axis, place.start)
                if key not in moved:
                    moved.add(key)
                    _permute(parameter, place, _expanded(order, free.unit, place.repeats))


def _permute(parameter: Tensor, place: Place, index: Tensor) -> None:
    part = parameter.narrow(place.axis, place.start, len(index))
    part.copy_(part.index_select(place.axis, index.to(parameter.device)))


def _checked(free: FreePermutation, order: Tensor) -> Tensor:
    import torch

    if order.dtype != torch.int64 or order.shape != (free.size,):
        raise ShapeError(f"order {free.name}: expected int64[{free.size}], found {order.dtype}{list(order.shape)}")
    units = order.cpu().reshape(-1, free.unit)
    if not torch.equal(units.sort(dim=1).values.reshape(-1), torch.arange(free.size)):
        raise ShapeError(f"order {free.name}: expected a permutation inside every unit of {free.unit}, found another")
    return order.cpu()


def _expanded(order: Tensor, unit: int, repeats: int) -> Tensor:
    """The index int64[size * repeats] of an axis that holds every unit `repeats` times."""
    import torch

    units = order.reshape(-1, 1, unit)
    first = torch.arange(len(units))[:, None, None]
    copies = (first * repeats + torch.arange(repeats)[None, :, None]) * unit
    return (units - first * unit + copies).reshape(-1)


def _check_places(free: FreePermutation, parameters: Mapping[str, nn.Parameter]) -> None:
    named = {place.parameter for place in free.places}
    for place in free.places:
        where = f"order {free.name}, parameter {place.parameter}"
        parameter = parameters.get(place.parameter)
        if parameter is None:
            raise ShapeError(f"{where}: expected it in the model, found none; apply permutations to the dense model")
        length = place.start + free.size * place.repeats
        if place.axis >= parameter.ndim or parameter.shape[place.axis] != length:
            raise ShapeError(f"{where}: expected {length} along axis {place.axis}, found {list(parameter.shape)}")
        bias = place.parameter.removesuffix("weight") + "bias"
        if place.axis == 0 and bias in parameters and bias not in named:
            raise ShapeError(f"{where}: its rows move but {bias} would stay; expected the family to name it as well")
