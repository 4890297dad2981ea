"""Drivers: what starts, stops and clocks instances. One contract (``port``), one file for each variant."""
