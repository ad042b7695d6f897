"""The questions a family answers. Everything a stage needs to know about a model, it asks here.

Questions about a checkpoint's config are answered without torch; questions about a loaded model import it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.device.families import HOSTS, Host, Prepared
from toolchain.device.families.base import open_image
from toolchain.errors import InputDataError
from toolchain.models.configs import Config, chat_template, head_dim, read_config
from toolchain.values import LayerSpec, Sample

if TYPE_CHECKING:
    import torch

    from toolchain.models.permutations import FreePermutation
    from toolchain.plan.geometry import ModelGeometry

CONTEXT_LIMIT = 4096  # the longest context that engines are built for
FIRST_BUCKET = 256
PREFILL_CHUNK = 1024


@dataclass(frozen=True)
class GraphSpec:
    """One graph to export: what is traced, with what, and what its inputs and outputs are called.

    `taps` are the output names, last in `output_names`, that exist for validation only. `dynamic_shapes` is what
    torch.export takes: one entry per input.
    """

    name: str
    module: torch.nn.Module
    args: tuple
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_shapes: tuple
    taps: tuple[str, ...] = ()


class Processor:
    """Samples to model inputs on the workstation, through the same host code that runs on the board."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def model_inputs(self, sample: Sample, with_answer: bool = False) -> dict[str, torch.Tensor]:
        """Keyword arguments of `model(...)` for one sample, batch of 1; the answer's ids follow if asked for.

        Raises:
            InputDataError: the image cannot be read.
        """
        import numpy as np
        import torch

        prepared = self.host.prepare(open_image(sample.image), sample.prompt)
        ids = prepared.input_ids
        if with_answer and sample.answer:
            answer = self.host.encode(sample.answer)
            ids = np.concatenate([ids, answer, np.asarray(self.host.stop_ids[:1], dtype=np.int64)])
        inputs = {
            "input_ids": torch.from_numpy(ids)[None],
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        }
        return inputs | self._image_inputs(prepared, inputs["input_ids"])

    def _image_inputs(self, prepared: Prepared, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        if not prepared.vision_feeds:
            return {}
        pixels = torch.from_numpy(np.concatenate([f["pixel_values"] for f in prepared.vision_feeds]))
        extra: dict[str, torch.Tensor] = {"pixel_values": pixels}
        if "position_ids" in prepared.vision_feeds[0]:
            grids = [f["position_ids"].max(axis=0) + 1 for f in prepared.vision_feeds]
            extra["image_grid_thw"] = torch.tensor([[1, int(rows), int(columns)] for rows, columns in grids])
            extra["mm_token_type_ids"] = (ids == self.host.image_token_id).int()
        return extra

    def is_image(self, ids: torch.Tensor) -> torch.Tensor:
        """bool, same shape: which positions hold image features."""
        return ids == self.host.image_token_id


class Family(ABC):
    """One family of VLMs."""

    name: str
    model_types: tuple[str, ...]

    @abstractmethod
    def layers(self, config: Config) -> tuple[LayerSpec, ...]:
        """Every weight that can be quantized, in the order of the forward pass; from config.json alone."""

    @abstractmethod
    def free_permutations(self, config: Config) -> tuple[FreePermutation, ...]:
        """Every column permutation that can be folded into what produces the columns; from config.json alone.

        The columns of every layer are in exactly one of them, those of the patch embedding (pixels) excepted.
        """

    @abstractmethod
    def geometry(self, config: Config) -> ModelGeometry:
        """The sizes the memory plan and the latency model need; from config.json alone."""

    @abstractmethod
    def host_settings(self, config: Config, folder: Path) -> dict[str, Any]:
        """The content of host.json for a checkpoint folder.

        Raises:
            InputDataError: a processor file is missing or lacks a key.
        """

    @abstractmethod
    def graphs(self, model: torch.nn.Module) -> list[GraphSpec]:
        """The graphs of a loaded model: vision, embed, decoder."""

    @abstractmethod
    def profiles(
        self, config: Config, folder: Path, settings: dict[str, Any] | None = None
    ) -> dict[str, dict[str, list[list[int]]]]:
        """Graph → input → [smallest, usual, largest] shape, for engine builders; batch 1.

        "decoder" is prefill and covers decode; "decoder.decode" is a second profile of the same engine, for one token a
        call. `settings` is the host.json that the engines will meet, `host_settings` (unlimited) where None.
        """

    def load_host(self, config: Config, folder: Path) -> Host:
        """The host half for a checkpoint folder."""
        template, tokenizer = chat_template(folder), folder / "tokenizer.json"
        if not tokenizer.is_file():
            raise InputDataError(f"{folder}: expected tokenizer.json; copy it from the published checkpoint")
        return HOSTS[self.name](self.host_settings(config, folder), tokenizer.read_bytes(), template)

    def load_processor(self, folder: Path, config: Config | None = None) -> Processor:
        """The workstation half for a checkpoint folder; `config` where it is read already."""
        return Processor(self.load_host(read_config(folder) if config is None else config, folder))


def decoder_lengths(context: int) -> dict[str, Any]:
    """host.json's lengths of decoder calls for a context.

    `past_buckets`: lengths of past that a device runs with, what is not filled hidden by the mask; doubling from 256,
    so that at most half of what a step reads is hidden. `prefill_chunk`: the most tokens of one call, so that no
    attention score tensor is larger than chunk x (context + chunk).
    """
    limit = min(context, CONTEXT_LIMIT)
    buckets, length = [], FIRST_BUCKET
    while length < limit:
        buckets.append(length)
        length *= 2
    return {"max_context": context, "past_buckets": [*buckets, limit], "prefill_chunk": min(limit, PREFILL_CHUNK)}


def limited_settings(settings: dict[str, Any], max_pixels: int, context: int) -> dict[str, Any]:
    """host.json's content for a target: images made smaller above `max_pixels`, no more than `context` tokens.

    Families of fixed tiles keep their images: a tile's size is the checkpoint's.
    """
    image, decoder = dict(settings["image"]), dict(settings["decoder"])
    if "max_pixels" in image:
        image["max_pixels"] = max(image["min_pixels"], min(image["max_pixels"], max_pixels))
    decoder |= decoder_lengths(min(decoder["max_context"], context))
    return settings | {"image": image, "decoder": decoder}


def decoder_layers(text: Config, prefix: str, first_order: int, biases: bool) -> list[LayerSpec]:
    """The linears of a Llama-shaped decoder (Qwen2, Llama, InternLM once split): seven a block, two fused groups."""
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * head_dim(text)
    keys = text["num_key_value_heads"] * head_dim(text)
    specs = []
    for i in range(text["num_hidden_layers"]):
        block, order = f"{prefix}.layers.{i}", first_order + i
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            specs.append(_linear(f"{block}.self_attn.{name}", rows, hidden, f"{block}.self_attn.qkv", order, biases))
        specs.append(_linear(f"{block}.self_attn.o_proj", hidden, queries, None, order, False))
        for name in ("gate_proj", "up_proj"):
            specs.append(_linear(f"{block}.mlp.{name}", inner, hidden, f"{block}.mlp.gate_up", order, False))
        specs.append(_linear(f"{block}.mlp.down_proj", hidden, inner, None, order, False))
    return specs


def _linear(name: str, rows: int, columns: int, group: str | None, order: int, bias: bool) -> LayerSpec:
    return LayerSpec(name, "language", "linear", rows, columns, group or name, order, bias)


def embedding_and_head(text: Config, config: Config, embedding: str, head: str, last_order: int) -> list[LayerSpec]:
    """The token embedding (swept first) and the LM head (last), which shares the embedding's codes when tied."""
    rows, columns = text["vocab_size"], text["hidden_size"]
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return [
        LayerSpec(embedding, "embedding", "embedding", rows, columns, embedding, 0),
        LayerSpec(
            head,
            "head",
            "linear",
            rows,
            columns,
            embedding if tied else head,
            last_order,
            False,
            embedding if tied else None,
        ),
    ]
