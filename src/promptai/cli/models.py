"""``promptai models``: find, fetch, check, quantise and imitate model files."""

import click

from promptai.cli.lazy import LazyGroup

_VERBS = {
    "list": ("promptai.cli.models_list:list_models", "What is here, what fits, and what each would do."),
    "pull": ("promptai.cli.models_pull:pull", "Fetch a model; goes on where an earlier try stopped."),
    "import": ("promptai.cli.models_library:import_", "Keep a file, a directory of files, or a bundle."),
    "export": ("promptai.cli.models_library:export", "Write a bundle for boards without a link."),
    "verify": ("promptai.cli.models_library:verify", "Compare kept models with their checksums."),
    "remove": ("promptai.cli.models_library:remove", "Delete kept models."),
    "disk": ("promptai.cli.models_library:disk", "What takes how much space, and what is free."),
    "inspect": (
        "promptai.cli.models_inspect:inspect",
        "What a GGUF file is, from its header, and whether it is whole.",
    ),
    "quantize": (
        "promptai.cli.models_quantize:quantize_model",
        "Make a 4-bit model of a 16-bit one, and say what that cost.",
    ),
    "check-catalog": (
        "promptai.cli.models_catalog:check_catalog",
        "Ask the hub whether the catalogue still holds.",
    ),
    "calibrate": ("promptai.cli.models_calibrate:calibrate", "Learn what this machine's engine does, for forecasts."),
    "synth": ("promptai.cli.models_synth:synth", "Write a model of true shape and random weights."),
}


@click.group(cls=LazyGroup, verbs=_VERBS)
def models() -> None:
    """Model files: find, fetch, check, quantise and imitate them."""
