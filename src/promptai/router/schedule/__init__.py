"""Decides when a request gets a slot: the queue, slot leases and the state of the fleet."""
