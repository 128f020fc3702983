"""Forecast a model's speed and memory on this machine before it is downloaded."""
