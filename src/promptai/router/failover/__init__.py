"""Carries one request through attempts on replicas until its answer is complete."""
