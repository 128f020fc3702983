"""The command line: parses, builds objects, prints. Decides nothing."""
