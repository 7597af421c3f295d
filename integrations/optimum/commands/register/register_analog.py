"""Read by ``optimum-cli`` at every start: keep it light, an ImportError breaks all commands."""

from optimum.commands.export.base import ExportCommand

from analog_integrations.optimum.cli import AnalogExportCommand
from analog_integrations.optimum.cli_analog import AnalogCommand

REGISTER_COMMANDS = [(AnalogExportCommand, ExportCommand), AnalogCommand]
