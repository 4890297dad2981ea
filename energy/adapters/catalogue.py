"""Profiles on disk: the shipped ones by name, any other by path; written whole or not at all.

A profile file is YAML with a ``format`` number; ``docs/profiles.md`` describes it.
"""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import msgspec
import yaml

from energy.fitted import FittedProfile
from energy.profile import EnergyProfile, ProfileError

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent.parent / "profiles"


def profile_names() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def profile_path(name_or_path: str | Path) -> Path:
    """Where a profile lies: a path that exists, or a shipped name. Raises ``ProfileError`` naming the shipped ones."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    raise ProfileError(
        f"no profile {str(name_or_path)!r}: not a file, and not one of the shipped {', '.join(profile_names())}"
    )


def load_profile(name_or_path: str | Path) -> EnergyProfile:
    """Read a profile: shipped, a profile file, or a CSV of one's own sweep (fitted as it is read: seconds).

    Raises ``ProfileError`` naming the file and the key or line that is wrong.
    """
    path = profile_path(name_or_path)
    if path.suffix == ".csv":
        from energy.adapters.measured_file import load_measured  # brings SciPy along: only when it is needed

        return load_measured(path)
    return load_fitted(path)


def load_fitted(name_or_path: str | Path) -> FittedProfile:
    """Read a fitted profile with its provenance. Raises ``ProfileError`` naming the file and key that are wrong."""
    path = profile_path(name_or_path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: not YAML: {error}") from None
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise ProfileError(f"{path}: not a profile of format {FORMAT}; fit it again with `dynamollm profile fit`")
    try:
        return msgspec.convert(document, FittedProfile, strict=False)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path}: {error}") from None


def save_fitted(profile: FittedProfile, path: Path) -> None:
    """Write a fitted profile; the file appears whole or not at all."""
    document = _plain({"format": FORMAT, **asdict(profile)})
    text = yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)
    write_whole(path, text.encode("utf-8"))


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _plain(value: object) -> object:
    """Tuples as lists and floats to seven digits, for a file that people read."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return value
