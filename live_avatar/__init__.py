"""Live Avatar: a causal video diffusion transformer that speaks, as a stream (see docs/architecture.md)."""

from live_avatar.version import __version__

__all__ = ["__version__"]
