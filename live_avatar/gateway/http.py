"""The routes of the HTTP ports: health, metadata of the model, and metrics. Nothing is inferred over HTTP."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from live_avatar.gateway.admission import Admission
from live_avatar.gateway.metrics import CONTENT_TYPE, GatewayMeter, triton_page
from live_avatar.gateway.requests import inputs_of
from live_avatar.serving.health import health_routes
from live_avatar.serving.served import Served
from live_avatar_client import protocol
from live_avatar_client.protocol import MODEL_NAME


def http_routes(admission: Admission, served: Served, speakers: int) -> list[web.RouteDef]:
    """Health, `/v2`, and readiness and metadata of the model, as KServe v2 has them."""

    async def server(request: web.Request) -> web.Response:
        return web.json_response({"name": "live-avatar", "version": served.version, "extensions": ["sequence"]})

    async def model(request: web.Request) -> web.Response:
        inputs, outputs = _tensors(inputs_of(speakers)), _tensors(protocol.OUTPUTS)
        facts = {"name": MODEL_NAME, "versions": ["1"], "platform": "live-avatar", "inputs": inputs, "outputs": outputs}
        return web.json_response(facts)

    async def ready(request: web.Request) -> web.Response:
        return web.Response(status=200 if admission.is_pipe_ready else 503)

    return [
        *health_routes(lambda: admission.is_ready),
        web.get("/v2", server),
        web.get(f"/v2/models/{MODEL_NAME}", model),
        web.get(f"/v2/models/{MODEL_NAME}/ready", ready),
    ]


def metrics_routes(meter: GatewayMeter, triton_metrics: Path) -> list[web.RouteDef]:
    """`/metrics`: the gateway's series, then those of Triton and the stages."""

    async def page(request: web.Request) -> web.Response:
        text = meter.text() + await triton_page(triton_metrics)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    return [web.get("/metrics", page)]


def _tensors(specs: tuple[protocol.TensorSpec, ...]) -> list[dict[str, object]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.dims)} for spec in specs]
