"""The project's version, written into artifacts and compared when they are loaded."""

__version__ = "0.1.0"
