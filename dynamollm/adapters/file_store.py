"""FileStore: documents as JSON files in one folder, each replaced whole or not at all."""

from pathlib import Path
from typing import Any

import msgspec

from energy.adapters.catalogue import write_whole


class FileStore:
    """See ``dynamollm.persistence.Store``. The folder is made at the first write, readable by its owner only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> dict[str, Any] | None:
        """The document, or None. Raises ``OSError``, ``ValueError`` for a file that is no JSON object."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(content, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, name: str, document: dict[str, Any]) -> None:
        """Replace the document. Raises ``OSError``; the old one is then still there."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self._path(name), msgspec.json.encode(document))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
