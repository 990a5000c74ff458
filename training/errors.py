"""What goes wrong in training, beside the core's errors. Part of the core's tree, so that one handler reports all."""

from live_avatar.errors import LiveAvatarError


class TrainingError(LiveAvatarError):
    """A run that cannot go on: a figure that is not finite, no room on the disk, or what it starts from is missing."""
