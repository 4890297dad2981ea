"""vLLM with an emulated device: real API server, scheduler and KV blocks; steps that last as the EnergyProfile says."""
