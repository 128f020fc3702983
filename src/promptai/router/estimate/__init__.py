"""Estimates what a request costs on each replica: rates, cached prompts, recent failures. Pure."""
