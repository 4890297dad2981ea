"""Where the public traces lie, and how to get one that is not there."""

import os
from collections.abc import Mapping
from pathlib import Path

from simulator.workload.arrivals import WorkloadError

VARIABLE = "DYNAMOLLM_DATA"
BESIDE_CHECKOUT = Path(__file__).resolve().parents[3].parent / "shared" / "data"

# file -> where it is published
ORIGINS: dict[str, str] = {
    "traces/AzureLLMInferenceTrace_conv.csv.gz": "github.com/Azure/AzurePublicDataset, data/ (CC-BY-4.0)",
    "traces/AzureLLMInferenceTrace_code.csv.gz": "github.com/Azure/AzurePublicDataset, data/ (CC-BY-4.0)",
    "traces/azure2024_code_requests_per_minute_digitised.csv": (
        "digitised from the figures of github.com/Azure/AzurePublicDataset's 2024 notebook (CC-BY-4.0)"
    ),
    "traces/servegen_m-large_days0-6.tar.zst": (
        "github.com/alibaba/ServeGen, data/language/m-large, days 0-6 packed as .tar.zst (Apache-2.0)"
    ),
    "traces/vidur_arxiv_lengths.csv.gz": "github.com/microsoft/vidur, data/processed_traces (MIT)",
}


def data_folders(environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Folders that may hold the public data, the first one preferred."""
    named = environ.get(VARIABLE)
    return (Path(named),) if named else (BESIDE_CHECKOUT,)


def data_file(relative: str, environ: Mapping[str, str] = os.environ) -> Path:
    """A file of the public data. Raises WorkloadError that says where to get it and where to put it."""
    folders = data_folders(environ)
    for folder in folders:
        if (folder / relative).is_file():
            return folder / relative
    origin = ORIGINS.get(relative, "the source named in its documentation")
    raise WorkloadError(
        f"{relative} is not in {folders[0]}: get it from {origin}, put it there or set {VARIABLE} to the folder that "
        "holds it; synthetic-conv, synthetic-code and synthetic-week need no file"
    )
