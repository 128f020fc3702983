"""Predicts what a request costs on each replica: rates, cached prompts, failures. Pure."""
