"""Which replicas exist: a list, this machine's own engines, pretended ones."""
