"""A web page to talk to an avatar, and the server behind it (extra `web`).

`options` says what it may do, `app` has its routes, `protocol` the messages of its WebSocket (docs/web.md).
"""
