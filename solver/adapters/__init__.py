"""Where a controller runs: a process of its own, out of the way of those that serve."""
