"""Experiments: trace replay, gateway overhead, solver scaling, the paper's table; their plots and results."""
