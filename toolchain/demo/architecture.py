"""The demo VLM before training: transformers' own Qwen2-VL classes with a small config, a tokenizer made offline.

Sizes are chosen so that every path of the toolchain is walked: grouped keys and values, a tied head, a patch embedding
whose 1,176 inputs are no multiple of 16, heads of 64, and dynamic resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from toolchain.demo import task

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 512
MIN_PIXELS = 56 * 56
MAX_PIXELS = 168 * 168

# One turn of user content, images as <|image_pad|>, as in Qwen2-VL's template without the system line.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(seed: int = 0, sentences: int = 20_000) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE entries, trained on the task's own questions and answers."""
    rng = np.random.default_rng(seed)
    corpus = ["<|im_start|>user\n", "<|im_start|>assistant\n"]
    for _ in range(sentences):
        scene = task.random_scene(rng)
        corpus.extend(task.ask(scene, rng)[1:])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be in the vocabulary."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"token {token!r} is not in the tokenizer's vocabulary of {tokenizer.get_vocab_size()}")
    return found


@dataclass(frozen=True)
class Sizes:
    """Widths and depths; heads of the decoder are 64 wide, as `mrope_section` has them."""

    hidden: int
    intermediate: int
    layers: int
    key_value_heads: int
    vision_embed: int
    vision_depth: int
    vision_heads: int


# "demo" is shipped (5.3 million weights); "larger" (25.0 million) shows whether what holds for it holds for another.
SIZES = {"demo": Sizes(256, 384, 8, 2, 128, 4, 4), "larger": Sizes(512, 1024, 8, 4, 256, 6, 8)}


def demo_config(tokenizer: Tokenizer, size: str = "demo"):
    """transformers.Qwen2VLConfig of a model of SIZES, tied head."""
    from transformers import Qwen2VLConfig

    sizes = SIZES[size]
    return Qwen2VLConfig(
        text_config={
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.hidden // 64,
            "num_key_value_heads": sizes.key_value_heads,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": token_id(tokenizer, "<|endoftext|>"),
            "eos_token_id": token_id(tokenizer, "<|im_end|>"),
            "pad_token_id": token_id(tokenizer, "<|endoftext|>"),
        },
        vision_config={
            "depth": sizes.vision_depth,
            "embed_dim": sizes.vision_embed,
            "hidden_size": sizes.hidden,
            "num_heads": sizes.vision_heads,
            "mlp_ratio": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_model(tokenizer: Tokenizer, seed: int = 0, size: str = "demo"):
    """A randomly initialised Qwen2VLForConditionalGeneration (float32) of one of SIZES."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(demo_config(tokenizer, size))


def save_processor_files(tokenizer: Tokenizer, folder) -> None:
    """Write tokenizer, image processor, chat template and generation config the way a published checkpoint has them."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=1024,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS).save_pretrained(folder)
    GenerationConfig(
        eos_token_id=token_id(tokenizer, "<|im_end|>"),
        pad_token_id=token_id(tokenizer, "<|endoftext|>"),
        do_sample=False,
    ).save_pretrained(folder)
