"""One llama-server: finding, starting, asking, imitating it."""
