"""The gateway's process: settings and commands come as JSON lines on standard input, reports go to standard output."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from typing import Any

from live_avatar.errors import LiveAvatarError
from live_avatar.gateway.server import run
from live_avatar.serving import LOG_MARK
from live_avatar.serving.gateway_settings import GatewaySettings

LOG_FORMAT = f"%(asctime)s{LOG_MARK}%(message)s"
MAX_LINE_BYTES = 2**20


def report(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def main() -> None:
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    settings = GatewaySettings.from_json((await reader.readline()).decode())

    async def commands() -> AsyncIterator[dict[str, Any]]:
        while line := await reader.readline():  # the pipe closes when `live-avatar serve` ends, for any reason
            yield json.loads(line)

    try:
        await run(settings, commands(), report)
    except LiveAvatarError as error:
        report({"error": str(error)})
        raise SystemExit(1) from None


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    asyncio.run(main())
