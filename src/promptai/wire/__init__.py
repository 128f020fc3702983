"""Protocols as types: what goes over the wire, without the wire."""
