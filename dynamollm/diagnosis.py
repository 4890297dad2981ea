"""Findings of ``dynamollm doctor``, and the judgements that need no I/O. Pure.

A finding says what was looked at, what was found, whether that is good, and what to do about it. FAIL means something
asked for will not work; WARN that it will work worse than it could; NOTE that something optional is not there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

STREAM_FILES = 2  # a relayed stream holds a socket to the client and one to the instance
FEW_STREAMS = 2000
ESTIMATE_LIMIT = 0.15  # above this a request near a cut is often taken for another class


class Verdict(Enum):
    """How good a finding is."""

    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    subject: str
    verdict: Verdict
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """One probe text: what the gateway took it for and what the engine counted."""

    kind: str
    estimated: int
    counted: int

    @property
    def relative_error(self) -> float:
        """Signed; above 0 the estimate is too high."""
        return (self.estimated - self.counted) / max(self.counted, 1)


def python_finding(version: Sequence[int], in_own_environment: bool) -> Finding:
    """Python's version, and whether the generic package names can collide with others."""
    found = ".".join(map(str, version[:3]))
    if tuple(version[:2]) < (3, 11):
        return Finding("python", Verdict.FAIL, found, "install Python 3.11 or newer")
    if not in_own_environment:
        fix = "its packages have generic names: run it from an environment of its own (make serve makes one)"
        return Finding("python", Verdict.WARN, f"{found}, not in a virtual environment", fix)
    return Finding("python", Verdict.OK, found)


def cores_finding(cores: int) -> Finding:
    """Cores this process may use."""
    if cores < 2:
        fix = "gateway and controllers share it with the emulated instances: give it two"
        return Finding("cores", Verdict.WARN, f"{cores}", fix)
    return Finding("cores", Verdict.OK, f"{cores}")


def open_files_finding(soft: int, hard: int) -> Finding:
    """How many streams the limit of open files allows; -1 is no limit."""
    if hard < 0:
        return Finding("open files", Verdict.OK, "no limit")
    streams = hard // STREAM_FILES
    found = f"{soft} (up to {hard}): about {streams} streams at once"
    if streams < FEW_STREAMS:
        return Finding("open files", Verdict.WARN, found, "raise the hard limit (ulimit -Hn, LimitNOFILE=65536)")
    return Finding("open files", Verdict.OK, found)


def estimate_finding(counts: Sequence[TokenCount]) -> Finding:
    """How far the gateway's token estimate is from the engine's count."""
    errors = [abs(count.relative_error) for count in counts]
    worst = max(counts, key=lambda count: abs(count.relative_error))
    found = (
        f"off by {median(errors):.1%} at the median, {max(errors):.1%} at worst ({worst.kind}: {worst.estimated} for "
        f"{worst.counted} tokens), over {len(counts)} texts"
    )
    if max(errors) > ESTIMATE_LIMIT:
        fix = "set models[].tokenizer_file to the model's tokenizer.json for exact counts"
        return Finding("token estimate", Verdict.WARN, found, fix)
    return Finding("token estimate", Verdict.OK, found)


def any_failed(findings: Iterable[Finding]) -> bool:
    """Whether something asked for will not work."""
    return any(finding.verdict is Verdict.FAIL for finding in findings)
