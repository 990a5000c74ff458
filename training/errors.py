"""The error of training. It belongs to the core's tree of errors, so that one handler reports all."""

from live_avatar.errors import LiveAvatarError


class TrainingError(LiveAvatarError):
    """A run cannot go on: a figure is not finite, the disk is full, or a file that it needs is missing."""
