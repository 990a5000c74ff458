"""A conversation through nginx with its buffers."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.web.support import PATIENCE_S, film, save, talking

NGINX = shutil.which("nginx")
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian: apt-get install nginx-light)")


def test_nginx_that_buffers_passes_a_conversation_and_a_recording(page: str, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "nginx.conf").write_text(
        f"""daemon off; worker_processes 1; pid {tmp_path}/pid; error_log stderr;
        events {{ }}
        http {{
          access_log off; proxy_buffering on; proxy_temp_path {tmp_path}/temp; client_body_temp_path {tmp_path}/body;
          fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;
          server {{
            listen 127.0.0.1:{port};
            location / {{
              proxy_pass {page}; proxy_http_version 1.1; proxy_set_header Host $http_host;
              proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;
            }}
          }}
        }}"""
    )
    nginx = subprocess.Popen([str(NGINX), "-c", tmp_path / "nginx.conf", "-p", tmp_path], stderr=subprocess.DEVNULL)
    proxied = f"http://127.0.0.1:{port}"

    async def visit() -> tuple[int, bytes]:
        async with talking(proxied) as talker:
            await talker.send(type="record.start")
            path, frames = "", 0
            while frames < 144:  # which come while the conversation goes on
                message = await talker.receive()
                if isinstance(message, dict):
                    path = message["path"]
                else:
                    frames += len(message.jpegs)
            return await asyncio.to_thread(save, proxied, path)

    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            with socket.socket() as trial:
                if not trial.connect_ex(("127.0.0.1", port)):
                    break
            assert time.monotonic() < deadline_s, "nginx has not started"
            time.sleep(0.1)
        status, file = asyncio.run(visit())
    finally:
        nginx.terminate()
        nginx.wait()
    assert status == 200
    assert len(film(file).frames) >= 60
