"""The model that comes with the package: ``promptai-tiny``.

A demo that first downloads gigabytes loses people, and a test without a real
model proves little. What this model is and is not: docs/concepts/promptai-tiny.md.
"""

from importlib.resources import files
from pathlib import Path

from promptai.errors import ModelNotFoundError

NAME = "promptai-tiny"


def bundled_model() -> Path:
    """
    Where promptai-tiny lies.

    Raises:
        ModelNotFoundError: The installation is incomplete.
    """
    path = Path(str(files("promptai.models") / "data" / f"{NAME}.gguf"))
    if not path.is_file():
        raise ModelNotFoundError(f"the bundled model is missing at {path}", hint="install promptai again")
    return path
