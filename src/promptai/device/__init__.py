"""The board under the engine: processor, memory, temperature and power."""
