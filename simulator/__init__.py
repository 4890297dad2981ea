"""The pretend world: one engine model, run as an emulated vLLM server in real time or by events in virtual time."""
