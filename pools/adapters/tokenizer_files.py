"""Reads a model's tokenizer.json and chat template from disk. The only place of pools/ that knows these files."""

import json
from pathlib import Path

from pools.exact_tokens import TemplateRefusal, TokenizerTokens

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(tokenizer_file: str | Path, chat_template_file: str | Path | None = None) -> TokenizerTokens:
    """The exact counter of a model.

    Without ``chat_template_file`` the template is looked for beside the tokenizer: ``chat_template.jinja``, else
    ``chat_template`` of ``tokenizer_config.json``. Raises ``ValueError`` naming the file.
    """
    path = Path(tokenizer_file)
    config = _config(path.with_name("tokenizer_config.json"))
    template_path = Path(chat_template_file) if chat_template_file is not None else None
    if template_path is None and path.with_name("chat_template.jinja").exists():
        template_path = path.with_name("chat_template.jinja")
    template = _read(template_path) if template_path is not None else config.get("chat_template")
    special_tokens = {name: _content(config.get(name)) for name in SPECIAL_TOKENS}
    try:
        return TokenizerTokens(_read(path), template if isinstance(template, str) else None, special_tokens)
    except TemplateRefusal as error:
        raise ValueError(f"{template_path or path.with_name('tokenizer_config.json')}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        config = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _content(token: object) -> str:
    """A special token is written as text, or as an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
