"""The one tree of exceptions of the core.

Every message is a sentence with the value that was met, what was expected, and the remedy. This
module knows nothing of who reports them: the CLI prints the sentence and exits with 2, the serving
models send it with its code to the client.
"""


class LiveAvatarError(Exception):
    """Root of everything the project raises on purpose."""


class ConfigError(LiveAvatarError, ValueError):
    """Sizes that do not fit together, or an unknown preset."""


class CheckpointError(LiveAvatarError):
    """Weights that are missing, surplus, or of another shape."""


class ArtifactError(LiveAvatarError):
    """An artifacts folder that is missing, damaged, or made by another version or preset."""


class ExportError(LiveAvatarError):
    """A graph that could not be exported as its contract says."""


class InputError(LiveAvatarError, ValueError):
    """Something the caller sent cannot be used: image, prompt, audio, seed."""


class SessionError(LiveAvatarError):
    """A session was used in a way its life does not allow (no start, a gap, after a failure)."""


class CapacityError(LiveAvatarError):
    """No room for another session: all are taken, or memory is."""


class ShutdownError(CapacityError):
    """The server is about to end, and takes or keeps no sessions."""


class ServerError(LiveAvatarError):
    """Triton could not be started or ended by itself."""


class WatermarkError(LiveAvatarError, ValueError):
    """A watermark key, operator's number or file to verify that cannot be used."""


class SigningError(LiveAvatarError, ValueError):
    """A certificate or private key that cannot be used for signing, or as an authority to trust."""
