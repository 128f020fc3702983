"""Reasoning about measurements: what a model will do here, before it is downloaded."""
