"""vLLM: training tokens from its offline engine."""
