"""The emulated vLLM instance and its GPUs, in real time: what a gateway sees of a cluster that is not there.

The files of this folder are pure and are given ``now_s``; sockets, timers and processes stand in ``adapters``. An
instance answers as vLLM 0.32 was measured to, at the pace an EnergyProfile gives; what it says is made of words, not
of a model. Entry points: ``python -m simulator.emulator`` (one process, many instances) and ``dynamollm emulate``.
"""
