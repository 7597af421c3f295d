"""aihwkit: its device models as noise models."""
