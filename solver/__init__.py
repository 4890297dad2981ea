"""What is decided: the MILP, forecasts, cluster, pool and instance controllers, plans. Pure, but for adapters."""
