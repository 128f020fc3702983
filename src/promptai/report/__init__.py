"""Views of a run: a table for the terminal, figures, an offline HTML page."""
