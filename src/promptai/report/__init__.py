"""Faces of a run: a table for the terminal, figures, one offline HTML page."""
