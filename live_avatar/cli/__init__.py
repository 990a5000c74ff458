"""The command line `live-avatar`."""
