"""What this integration offers to the plugin manager."""

from __future__ import annotations

from collections.abc import Iterable

from analog_plugin.plugins import Exporter, hookimpl


@hookimpl
def analog_exporters() -> Iterable[Exporter]:
    """The format of the published analog models."""
    from analog_integrations.lightning import exporting

    yield Exporter(
        "lightning",
        exporting.write_lightning,
        "for aihwkit-lightning: pytorch_model.bin and rpu_config",
        exporting.check_lightning,
        exporting.plan_lightning,
    )
