"""``promptai models``: find, download, verify, quantise and synthesise model files."""

import click

from promptai.cli.lazy import LazyGroup

_VERBS = {
    "list": ("promptai.cli.models_list:list_models", "List models, whether they fit, and how fast they would be."),
    "pull": ("promptai.cli.models_pull:pull", "Download a model; resumes an interrupted download."),
    "import": ("promptai.cli.models_library:import_", "Add a file, a directory of files, or a bundle."),
    "export": ("promptai.cli.models_library:export", "Write a bundle for boards without a network."),
    "verify": ("promptai.cli.models_library:verify", "Compare downloaded models with their checksums."),
    "remove": ("promptai.cli.models_library:remove", "Delete downloaded models."),
    "disk": ("promptai.cli.models_library:disk", "Show the disk space that models use."),
    "inspect": (
        "promptai.cli.models_inspect:inspect",
        "Show a GGUF file's header, and check that the file is complete.",
    ),
    "quantize": (
        "promptai.cli.models_quantize:quantize_model",
        "Quantise a 16-bit model to 4 bits, and measure the loss.",
    ),
    "check-catalog": (
        "promptai.cli.models_catalog:check_catalog",
        "Compare the catalogue with the hub.",
    ),
    "calibrate": ("promptai.cli.models_calibrate:calibrate", "Measure this machine's engine, for forecasts."),
    "synth": ("promptai.cli.models_synth:synth", "Write a model with a real shape and random weights."),
}


@click.group(cls=LazyGroup, verbs=_VERBS)
def models() -> None:
    """Find, download, verify, quantise and synthesise model files."""
