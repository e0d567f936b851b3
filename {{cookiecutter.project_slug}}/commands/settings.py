"""The settings, for commands: mistakes in them end the command."""

import config
from postgres.console import fail


def settings_or_fail() -> config.Settings:
    """Return the settings, or end the command with a line for each mistake."""
    try:
        settings = config.load_settings(config.ENV_FILE)
    except config.SettingsError as error:
        fail(*map(str, error.mistakes))
    config.clear_libpq_variables(settings)
    return settings
