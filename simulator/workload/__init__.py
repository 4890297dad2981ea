"""Workloads: streams of (arrival, input tokens, output tokens), recorded or generated, never held whole in memory."""
