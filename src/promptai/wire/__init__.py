"""Protocols as types, without I/O."""
