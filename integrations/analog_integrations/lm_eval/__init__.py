"""lm-eval: its tasks in sweeps, the model type ``analog``, and tasks that need no download."""
