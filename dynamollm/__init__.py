"""The front door: command line, settings, wiring and the runner. The only package that names concrete adapters."""
