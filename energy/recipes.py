"""Which public measurements each shipped profile is fitted from; values only, run by ``benchmarks.profile_table``."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from energy.fit import FitRequest
from energy.fitted import Source
from energy.measurements import Measurement, ServedPower
from energy.models import MODELS

AICONFIGURATOR_FILE = "aiconfigurator_llama_h100_h200.csv"
SPLITWISE_FILE = "splitwise_perf_model.csv"
ML_ENERGY_FILE = "mlenergy_v2.csv"

_LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
_LLAMA_70B = "meta-llama/Llama-3.1-70B-Instruct"
_LLAMA_2 = "meta-llama/Llama-2-70b-hf"

# file -> (data set, commit, licence)
_DATA_SETS = {
    AICONFIGURATOR_FILE: ("ai-dynamo/aiconfigurator", "095f58a5", "Apache-2.0"),
    SPLITWISE_FILE: ("Mutinifni/splitwise-sim", "8f99e7dc", "MIT"),
    ML_ENERGY_FILE: ("ml-energy/leaderboard-v2", "c3af7f31", "Apache-2.0"),
}
# Weights of 138 GB leave an engine at vLLM's default 90 % of 2 x 80 GB nothing; batches of 32 x 640 tokens were
# measured there, so it ran with more: 95 % of the memory and 1.5 GB of buffers.
_LLAMA_2_AT_TP2_TOKENS = 33_691
_H100_POWER_ORIGIN = {
    "activity_power": "physical assumption: the H100's (same die), whose fit stands on ML.ENERGY; no H200 power data"
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One shipped profile: which rows of which file, and whether ML.ENERGY's power of the same GPU goes in."""

    name: str
    file: str
    model: str
    gpu: str
    engine: str
    precision: str
    uses_served_power: bool = False
    takes_power_of: str = ""  # another profile of the same die, fitted before
    kv_capacity: dict[int, int] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file it needs."""
        return (self.file, ML_ENERGY_FILE) if self.uses_served_power else (self.file,)

    def request(self, measurements: Sequence[Measurement], served: Sequence[ServedPower]) -> FitRequest:
        """The fit it asks for, from all rows of its files."""
        rows = [
            m
            for m in measurements
            if (m.model, m.gpu, m.engine, m.precision) == (self.model, self.gpu, self.engine, self.precision)
        ]
        readings = [s for s in served if s.gpu == self.gpu and s.model in MODELS] if self.uses_served_power else []
        counts = {self.file: len(rows), ML_ENERGY_FILE: len(readings)}
        return FitRequest(
            name=self.name,
            measurements=rows,
            served_power=readings,
            sources=tuple(Source(*_DATA_SETS[file], rows=counts[file]) for file in self.files),
            kv_capacity=self.kv_capacity,
            needs_power=not self.takes_power_of,
            notes=_H100_POWER_ORIGIN if self.takes_power_of else {},
        )


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "llama-3.1-70b-fp8-h100", AICONFIGURATOR_FILE, _LLAMA_70B, "H100-SXM", "vllm", "fp8", uses_served_power=True
    ),
    Recipe(
        "llama-3.1-8b-bf16-h100",
        AICONFIGURATOR_FILE,
        _LLAMA_8B,
        "H100-SXM",
        "trtllm 1.0.0rc3",
        "bf16",
        uses_served_power=True,
    ),
    Recipe(
        "llama-3.1-70b-fp8-h200",
        AICONFIGURATOR_FILE,
        _LLAMA_70B,
        "H200-SXM",
        "vllm",
        "fp8",
        takes_power_of="llama-3.1-70b-fp8-h100",
    ),
    Recipe(
        "llama-2-70b-h100",
        SPLITWISE_FILE,
        _LLAMA_2,
        "H100-SXM",
        "vllm of 2023",
        "bf16",
        uses_served_power=True,
        kv_capacity={2: _LLAMA_2_AT_TP2_TOKENS},
    ),
    Recipe(
        "llama-2-70b-a100",
        SPLITWISE_FILE,
        _LLAMA_2,
        "A100-80GB-SXM",
        "vllm of 2023",
        "bf16",
        kv_capacity={2: _LLAMA_2_AT_TP2_TOKENS},
    ),
)

# Fitted as well and not shipped: their load generators are not documented, and the errors say that the closed loops
# assumed for them are not what was run.
TRIED: tuple[Recipe, ...] = (
    Recipe(
        "llama-3.1-8b-fp8-h200, vLLM 0.12",
        AICONFIGURATOR_FILE,
        _LLAMA_8B,
        "H200-SXM",
        "vllm 0.12.0",
        "fp8",
        takes_power_of="-",
    ),
    Recipe(
        "llama-3.1-70b-fp8-h200, TensorRT-LLM",
        AICONFIGURATOR_FILE,
        _LLAMA_70B,
        "H200-SXM",
        "trtllm",
        "fp8",
        takes_power_of="-",
    ),
)


@dataclass(frozen=True, slots=True)
class Move:
    """A shipped profile that is another one moved to a GPU of the same die, and where the same move was measured."""

    name: str
    source: str
    gpu: str
    checked_from: str  # a profile of the source's GPU ..
    checked_on: Recipe  # .. whose move is compared with these measurements


MOVES: tuple[Move, ...] = (
    Move(
        name="llama-3.1-8b-bf16-h200",
        source="llama-3.1-8b-bf16-h100",
        gpu="H200-SXM",
        checked_from="llama-3.1-70b-fp8-h100",
        checked_on=next(recipe for recipe in RECIPES if recipe.name == "llama-3.1-70b-fp8-h200"),
    ),
)
