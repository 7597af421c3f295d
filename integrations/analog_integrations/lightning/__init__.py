"""aihwkit-lightning: its published analog models for us, and ours for it."""

from analog_integrations.lightning.exporting import to_lightning
from analog_integrations.lightning.importing import Imported, import_lightning

__all__ = ["Imported", "import_lightning", "to_lightning"]
