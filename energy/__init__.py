"""What a configuration costs: profiles of latency and power, their fitting, accounting and GPU clocks.

The lowest layer: imports nothing of the project.
I/O (NVML, files, HTTP) stands in ``energy/adapters``; all else is pure.
"""
