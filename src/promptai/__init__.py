"""PromptAI: measure, advise and serve generative AI on CPU-only edge boards."""

__version__ = "0.1.0"
