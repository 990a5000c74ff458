"""`python -m live_avatar.cli` is `live-avatar`."""

from live_avatar.cli.main import main

main(prog_name="live-avatar")
