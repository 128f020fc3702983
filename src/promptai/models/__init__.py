"""Files that hold models: reading their headers, imitating their shapes, fetching from the hub."""
