"""What is decided: the MILP, forecasts, the cluster, pool and instance controllers, reconfiguration plans. Pure."""
