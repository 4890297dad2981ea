"""Makes Llamas with random weights and a tokenizer trained on Python's own library: make_model.py SIZE DIRECTORY.

Nothing is downloaded. The models say nothing sensible; they have the real architecture, tokenizer and chat format.
SIZE is small (7 million parameters, 2 ms a step on one core), medium (31 million, some 10 ms) or nano (as quick as
vLLM itself allows, long context).
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "small": {
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "medium": {
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "nano": {
        "vocab_size": 4096,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-level BPE over the standard library's sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))], trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, context_tokens: int, directory: Path) -> None:
    """The files transformers reads."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_tokens,
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_model(tokenizer: Tokenizer, sizes: dict[str, int], directory: Path) -> None:
    """32-bit weights, the same ones every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|pad|>"),
        tie_word_embeddings=False,
        dtype="float32",
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.bos_token_id = None
    model.save_pretrained(directory, safe_serialization=True)


def main() -> None:
    """Write tokenizer and weights."""
    sizes, directory = SIZES[sys.argv[1]], Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(sizes["vocab_size"])
    write_tokenizer(tokenizer, sizes["max_position_embeddings"], directory)
    write_model(tokenizer, sizes, directory)


main()
