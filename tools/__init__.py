"""The `carryon` command: one short file per subcommand."""
