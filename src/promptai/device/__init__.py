"""The machine under the model: its processor, memory, heat and power."""
