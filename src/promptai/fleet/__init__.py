"""The replicas that exist: listed servers, this machine's engines, simulated ones."""
