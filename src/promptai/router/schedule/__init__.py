"""Gives each request a slot: the queue, the leases and the state of the fleet."""
