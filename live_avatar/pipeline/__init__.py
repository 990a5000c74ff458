"""The stages of a stream and the state of a session, without a server."""
