"""Takes the shipped statistics from the public traces and writes ``simulator/workload/published.json``.

Run as ``python -m simulator.workload.adapters.publish`` with the traces at hand.
"""

import os

import msgspec

from simulator.workload.adapters.azure import azure_trace
from simulator.workload.adapters.azure2024 import RATE_FILE, azure2024_code_week
from simulator.workload.adapters.location import data_file
from simulator.workload.adapters.published import PUBLISHED
from simulator.workload.statistics import TraceStatistics, taken_from


def hour_statistics(kind: str) -> TraceStatistics:
    """The statistics of one hour of Azure 2023, ``kind`` conv or code, minute by minute."""
    workload = azure_trace(data_file(f"traces/AzureLLMInferenceTrace_{kind}.csv.gz"))
    source = f"AzureLLMInferenceTrace_{kind}, Azure/AzurePublicDataset @ b469a113, CC-BY-4.0"
    return taken_from(workload, f"synthetic-{kind}", source, 60.0)


def week_statistics() -> TraceStatistics:
    """The statistics of the Azure 2024 code week, half hour by half hour."""
    workload = azure2024_code_week(data_file(f"traces/{RATE_FILE}").parent, seed=0)
    source = "Azure 2024 code week, digitised from Azure/AzurePublicDataset @ b469a113, CC-BY-4.0"
    return taken_from(workload, "synthetic-week", source, 1800.0)


def main() -> None:
    """Write the file whole or not at all."""
    entries = (hour_statistics("conv"), hour_statistics("code"), week_statistics())
    text = msgspec.json.format(msgspec.json.encode({entry.name: entry for entry in entries}), indent=0)
    fresh = PUBLISHED.with_suffix(".new")
    fresh.write_bytes(text.replace(b"},", b"},\n") + b"\n")
    os.replace(fresh, PUBLISHED)


if __name__ == "__main__":
    main()
