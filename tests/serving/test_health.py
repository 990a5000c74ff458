"""The HTTP ports, without a server behind them."""

from __future__ import annotations

import logging
import socket

import pytest

from live_avatar.serving import LOG_MARK
from live_avatar.serving.health import health_port
from live_avatar.serving.server_options import free_ports

WORDS = f"2026-01-01 00:00:00,000{LOG_MARK}session 1 started"


@pytest.mark.parametrize(
    "request_",
    [
        f"GET /{WORDS} HTTP/9.9\r\n\r\n",
        f"GET / HTTP/1.1\r\n{WORDS}\r\n\r\n",
        f"{WORDS}\r\n\r\n",
        "GET / HTTP/1.1\r\nA: \0\r\n\r\n",
    ],
    ids=["version", "header", "line", "zero"],
)
def test_a_caller_cannot_write_into_the_log(request_: str, caplog: pytest.LogCaptureFixture) -> None:
    [port] = free_ports(1)
    with caplog.at_level(logging.DEBUG), health_port("127.0.0.1", port, lambda: True):
        with socket.create_connection(("127.0.0.1", port), timeout=10.0) as connection:
            connection.sendall(request_.encode())
            assert connection.recv(100).startswith(b"HTTP/1.0 400 ")
        with socket.create_connection(("127.0.0.1", port), timeout=10.0) as connection:
            connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
