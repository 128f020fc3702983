"""Measuring: workloads, playing them, recording, statistics. Sees the world only over HTTP."""
