"""What is known of the cluster: request classes, SLOs, pools, instances, the router and length prediction.

Pure but for ``pools/drivers`` (starting engines) and ``pools/adapters`` (shared state).
"""
