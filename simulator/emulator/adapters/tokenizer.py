"""A Hugging Face tokenizer.json as the emulator's Tokenizer. Reads that one file; needs no network."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as HuggingFace


class FileTokenizer:
    """Exact token counts. The chat template is ChatML if the vocabulary has it, Llama 3's otherwise.

    Raises ``ValueError`` naming the file if it is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = HuggingFace.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
        self._chatml = self._tokenizer.token_to_id("<|im_start|>") is not None

    @property
    def vocabulary(self) -> int:
        """Ids are below this."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids, with those the tokenizer adds by itself."""
        return self._tokenizer.encode(text).ids

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self._tokenizer.encode(text))

    def count_chat(self, messages: Sequence[tuple[str, str]]) -> int:
        """How many tokens a conversation has."""
        return len(self.encode_chat(messages))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation through the template."""
        return self._tokenizer.encode(self._render(messages), add_special_tokens=False).ids

    def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        if self._chatml:
            turns = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages]
            return "".join(turns) + "<|im_start|>assistant\n"
        turns = [f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in messages]
        return "<|begin_of_text|>" + "".join(turns) + "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)
