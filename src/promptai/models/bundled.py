"""The model shipped with the package, ``promptai-tiny``.

A demo that starts with a download of gigabytes loses its users, and a test without a
real model proves little. docs/concepts/promptai-tiny.md describes the model and its limits.
"""

from importlib.resources import files
from pathlib import Path

from promptai.errors import ModelNotFoundError

NAME = "promptai-tiny"


def bundled_model() -> Path:
    """
    Return the path of promptai-tiny.

    Raises:
        ModelNotFoundError: The installation is incomplete.
    """
    path = Path(str(files("promptai.models") / "data" / f"{NAME}.gguf"))
    if not path.is_file():
        raise ModelNotFoundError(f"the bundled model is missing at {path}", hint="reinstall promptai")
    return path
