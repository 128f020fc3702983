"""llama-server: finding, building, starting, requesting and simulating it."""
