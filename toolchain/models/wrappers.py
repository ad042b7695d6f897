"""Modules that turn a transformers VLM into traceable graphs: the parts every family has in the same shape.

Attention, its masks and key/value handling are written out here, because the library's own build them from Python state
that does not trace, and join past and new keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from toolchain.models.family import GraphSpec

_ATTENTION = "mgvq"


def image_rank(is_image: torch.Tensor) -> torch.Tensor:
    """int64[B, S]: how many are set of bool[B, S] up to each place, itself included, in reading order.

    Sums under triangles instead of cumsum: TensorRT 10.3's parser makes a loop of CumSum, one step a token, which no
    CUDA graph can hold. Float32 counts exactly up to 2^24.
    """
    row, place = (torch.arange(size, device=is_image.device) for size in is_image.shape)
    within = ((place[:, None] >= place[None, :]) & is_image[:, None, :]).to(torch.float32).sum(2)
    earlier = (row[:, None] > row[None, :]).to(torch.float32)
    return (within + (earlier * is_image.to(torch.float32).sum(1)).sum(1, keepdim=True)).to(torch.int64)


class EmbedGraph(nn.Module):
    """Token ids int64[B, S] and image features [M, hidden] → embeddings [B, S, hidden].

    The i-th image token of the batch, in reading order, takes the i-th feature row. Running count and gather instead
    of masked_scatter: TensorRT refuses the NonZero that masked_scatter becomes.
    """

    def __init__(self, model: nn.Module, image_token_id: int) -> None:
        super().__init__()
        self.tokens = model.get_input_embeddings()  # type: ignore[operator]
        self.image_token_id = image_token_id

    def forward(self, input_ids: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
        embeds = self.tokens(input_ids)
        is_image = input_ids == self.image_token_id
        rank = image_rank(is_image)
        # Row 0 is a row of zeros, so that rank 0 (no image yet) and an empty feature list are both in range.
        rows = torch.cat([image_features.new_zeros(1, image_features.shape[1]), image_features])
        return torch.where(is_image.unsqueeze(-1), rows[rank * is_image], embeds)


class DecoderGraph(nn.Module):
    """Embeddings, mask, positions and past keys/values → last-position logits, new keys/values, every layer's output.

    Keys and values are [sequence, batch, kv_heads, head_dim]; past has length P, new length S. `attention_mask`
    int64[B, P + S] is 0 for padding and for places of past that are not filled: P may be a bucket's length, larger than
    what is there. Past and new keys meet in the scores only, so that the cache is read in place and never copied.
    """

    def __init__(self, decoder: Any, head: nn.Module) -> None:
        super().__init__()
        self.decoder: Any = decoder
        self.head = head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]], list[torch.Tensor]]:
        cache = _PastAndNew([(k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)) for k, v in past])
        mask = causal_mask(attention_mask, inputs_embeds.shape[1], inputs_embeds.dtype)
        hidden = inputs_embeds
        rotary = self.decoder.rotary_emb(hidden, position_ids)
        taps = []
        with written_out_attention(self.decoder.config):
            for layer in self.decoder.layers:
                hidden = layer(
                    hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=True
                )
                taps.append(hidden)
        last = self.decoder.norm(hidden[:, -1])
        present = [tuple(x.permute(2, 0, 1, 3) for x in cache.new[i]) for i in range(len(past))]
        return self.head(last), present, taps


class _PastAndNew:
    """What a layer takes for a cache: keeps the new keys and values, and hands on (past, new) pairs unjoined."""

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.past = past
        self.new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[tuple[torch.Tensor, ...], ...]:
        self.new[layer] = keys, values
        past_keys, past_values = self.past[layer]
        return (past_keys, keys), (past_values, values)


def attention(
    query: torch.Tensor,
    keys: tuple[torch.Tensor, ...],
    values: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """softmax(q Kᵀ · scaling + mask) V, [B, S, heads, D], over pieces of keys and values that are never joined.

    Args:
        query: [B, heads, S, D]; the scale is applied to it, which keeps float16 scores in range.
        keys, values: pieces [B, kv_heads, T_i, D]; each serves heads / kv_heads neighbouring query heads, unrepeated.
        mask: additive [B, 1, S, ΣT_i], or None.
    """
    batch, heads, length, size = query.shape
    kv_heads = keys[0].shape[1]
    grouped = (batch, kv_heads, heads // kv_heads * length, size)
    scaled = (query * scaling).reshape(grouped) if kv_heads < heads else query * scaling
    pieces = [scaled @ piece.transpose(-1, -2) for piece in keys]
    scores = torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]
    if mask is not None:
        by_head = scores.reshape(batch, kv_heads, heads // kv_heads, length, scores.shape[-1])
        scores = (by_head + mask[:, :, None]).reshape(scores.shape)
    weights = torch.softmax(scores, dim=-1)
    shares, start = [], 0
    for piece in values:
        shares.append(weights[..., start : start + piece.shape[2]] if len(values) > 1 else weights)
        start = start + piece.shape[2]
    mixed = shares[0] @ values[0]
    for share, piece in zip(shares[1:], values[1:], strict=True):
        mixed = mixed + share @ piece
    return mixed.reshape(batch, heads, length, size).transpose(1, 2)


def _attention_interface(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`attention` as transformers calls it: key and value are tensors, or the pieces `_PastAndNew` hands on."""
    keys, values = (x if isinstance(x, tuple) else (x,) for x in (key, value))
    return attention(query, keys, values, attention_mask, scaling), None


@contextmanager
def written_out_attention(config: Any) -> Iterator[None]:
    """Layers that share `config` compute `attention` inside; what they computed before, outside.

    The library's own implementations repeat keys for grouped heads, and guard against NaN where no row is empty.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention_interface)
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def causal_mask(attention_mask: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [B, 1, S, P + S]: 0 where a query may look, the smallest number of `dtype` elsewhere."""
    total = attention_mask.shape[1]
    query = torch.arange(length, device=attention_mask.device) + (total - length)
    key = torch.arange(total, device=attention_mask.device)
    allowed = (key[None, :] <= query[:, None])[None, None] & (attention_mask[:, None, None, :] > 0)
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)


def embed_graph_spec(model: nn.Module, image_token_id: int) -> GraphSpec:
    """GraphSpec of `embed`: input_ids, image_features → inputs_embeds."""
    from torch.export import Dim

    table = model.get_input_embeddings()  # type: ignore[operator]
    hidden = getattr(table, "columns", None) or table.embedding_dim
    ids = torch.tensor([[1, image_token_id, image_token_id, 3], [3, image_token_id, 2, 1]])
    return GraphSpec(
        "embed",
        EmbedGraph(model, image_token_id).eval(),
        (ids, torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))),
        ("input_ids", "image_features"),
        ("inputs_embeds",),
        ({0: Dim("batch"), 1: Dim("sequence")}, {0: Dim("features")}),
    )


def decoder_graph_spec(decoder: nn.Module, head: nn.Module, text_config: Any, axes: int) -> GraphSpec:
    """GraphSpec of `decoder`; `axes` position axes (3 for mRoPE, 1 otherwise)."""
    from torch.export import Dim

    layers, kv_heads = text_config.num_hidden_layers, text_config.num_key_value_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    # Sizes that differ from one another and from 1, or the tracer takes two of them for the same dimension.
    batch, length, past = 2, 3, 5
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(past, past + length)
    position = position.expand(3, batch, length) if axes == 3 else position.expand(batch, length)
    cache = [
        tuple(torch.randn(past, batch, kv_heads, size, generator=generator) for _ in range(2)) for _ in range(layers)
    ]
    embeds = torch.randn(batch, length, text_config.hidden_size, generator=generator)
    args = (embeds, torch.ones(batch, past + length, dtype=torch.int64), position.clone(), cache)
    b, s, p = Dim("batch"), Dim("sequence"), Dim("past")
    shapes = (
        {0: b, 1: s},
        {0: b, 1: Dim.DYNAMIC},
        {1: b, 2: s} if axes == 3 else {0: b, 1: s},
        [({0: p, 1: b}, {0: p, 1: b})] * layers,
    )
    pairs = [f"{i}.{name}" for i in range(layers) for name in ("key", "value")]
    taps = tuple(f"decoder.layers.{i}" for i in range(layers))
    return GraphSpec(
        "decoder",
        DecoderGraph(decoder, head).eval(),
        args,
        ("inputs_embeds", "attention_mask", "position_ids", *(f"past.{x}" for x in pairs)),
        ("logits", *(f"present.{x}" for x in pairs), *taps),
        shapes,
        taps,
    )
