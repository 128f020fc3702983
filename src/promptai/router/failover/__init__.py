"""Sends one request to engines until its answer is complete: attempts, retries, answers resumed elsewhere."""
