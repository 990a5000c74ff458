"""The HTTP ports: health and metadata of the model, and Prometheus' page. Nothing is inferred over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from aiohttp import web

from live_avatar.gateway.admission import Admission
from live_avatar.gateway.metrics import CONTENT_TYPE, GatewayMeter, triton_page
from live_avatar.serving.served import Served
from live_avatar_client import protocol
from live_avatar_client.protocol import MODEL_NAME

MAX_BODY_BYTES: Final = 1024  # no handler reads a body
KEEP_ALIVE_S: Final = 15.0


def health_app(admission: Admission, served: Served) -> web.Application:
    """`/v2/health/live`, `/v2/health/ready`, `/v2`, and readiness and metadata of the model, as KServe v2 has them."""

    async def live(request: web.Request) -> web.Response:
        return web.Response()

    async def ready(request: web.Request) -> web.Response:
        return web.Response(status=200 if admission.is_ready else 503)

    async def server(request: web.Request) -> web.Response:
        return web.json_response({"name": "live-avatar", "version": served.version, "extensions": ["sequence"]})

    async def model(request: web.Request) -> web.Response:
        inputs, outputs = _tensors(protocol.INPUTS), _tensors(protocol.OUTPUTS)
        facts = {"name": MODEL_NAME, "versions": ["1"], "platform": "live-avatar", "inputs": inputs, "outputs": outputs}
        return web.json_response(facts)

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.get("/v2/health/live", live),
            web.get("/v2/health/ready", ready),
            web.get("/v2", server),
            web.get(f"/v2/models/{MODEL_NAME}", model),
            web.get(f"/v2/models/{MODEL_NAME}/ready", ready),
        ]
    )
    return app


def metrics_app(meter: GatewayMeter, triton_metrics: Path) -> web.Application:
    """`/metrics`: the gateway's series, then those of Triton and the stages."""

    async def page(request: web.Request) -> web.Response:
        text = meter.text() + await triton_page(triton_metrics)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.add_routes([web.get("/metrics", page)])
    return app


async def listen(app: web.Application, address: str, port: int) -> web.AppRunner:
    """Serves an app until the runner is cleaned up. Raises `OSError` for an address or port that cannot be used."""
    limits: dict[str, Any] = {"max_line_size": 4096, "max_field_size": 4096, "keepalive_timeout": KEEP_ALIVE_S}
    runner = web.AppRunner(app, access_log=None, handle_signals=False, **limits)
    await runner.setup()
    await web.TCPSite(runner, address, port, backlog=128).start()
    return runner


def _tensors(specs: tuple[protocol.TensorSpec, ...]) -> list[dict[str, object]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.dims)} for spec in specs]
