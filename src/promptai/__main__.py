"""``python -m promptai`` is the same as ``promptai``."""

from promptai.cli.main import main

if __name__ == "__main__":
    main()
