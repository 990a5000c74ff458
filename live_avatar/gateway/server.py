"""Runs the gateway: opens its ports, and follows the commands of `live-avatar serve`."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final

import grpc

from live_avatar.arrays import Array
from live_avatar.errors import ServerError
from live_avatar.gateway.admission import Admission, Phase
from live_avatar.gateway.audit import AuditLog
from live_avatar.gateway.avatars import Avatars, AvatarSource
from live_avatar.gateway.certificates import Certificates, SigningPair
from live_avatar.gateway.context import SessionContext
from live_avatar.gateway.frames import FramePool
from live_avatar.gateway.http import http_routes, metrics_routes
from live_avatar.gateway.keys import KeyRing
from live_avatar.gateway.metrics import GatewayMeter
from live_avatar.gateway.pictures import PictureDecoder
from live_avatar.gateway.pipe import Pipe
from live_avatar.gateway.service import GatewayService, Keys
from live_avatar.gateway.window import PipeWindow
from live_avatar.serving import metrics
from live_avatar.serving.access import Access
from live_avatar.serving.control import Control
from live_avatar.serving.failures import PipeError
from live_avatar.serving.gateway_settings import GatewaySettings
from live_avatar.serving.health import listen
from live_avatar.serving.options import OptionsReader
from live_avatar.serving.provenance import ProvenanceWriter
from live_avatar.serving.tensors import AVATAR_ENCODER
from live_avatar_client.protocol import MAX_IMAGE_BYTES, ErrorCode

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = MAX_IMAGE_BYTES + 64 * 1024
CHECK_S: Final = 0.5
FILE_CHECK_S: Final = 1.0
RELEASE_S: Final = 10.0
REPORT_S: Final = 0.1
SAME_REPORT_S: Final = 1.0
GRACE_S: Final = 1.0
CLOSING_S: Final = 2.0
"""How long Triton may take at the end to answer what is under way."""
# gRPC checks the size of a compressed message before and after it is decompressed.
GRPC_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 64),
    # What a caller may send ahead of what is read. By default the window grows to tens of megabytes.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    ("grpc.max_connection_idle_ms", 20_000),
    ("grpc.server_handshake_timeout_ms", 5_000),
    # A caller whose machine or network is gone: noticed after 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)

Report = Callable[[dict[str, Any]], None]


async def run(settings: GatewaySettings, commands: AsyncIterator[dict[str, Any]], report: Report) -> None:
    """Serves until `commands` ends. Raises `ServerError` for a port, key or certificate that cannot be used.

    report: is told once that the ports are open, and then the phase, readiness and the live sessions at each change and
    every second.
    Commands: {"pipe_ready": bool}, {"phase": str}, {"lost": name of a stage}.
    """
    raise_file_limit()
    keys, certificates, signing = load_keys(settings), load_certificates(settings), load_signing(settings)
    context = session_context(settings, signing)
    service = GatewayService(context, keys, settings.limits.idle_s)
    server = grpc.aio.server(options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((service,))
    runners = []
    background = [
        asyncio.create_task(_repeat(act, seconds))
        for act, seconds in (
            (service.check, CHECK_S),
            (partial(_check_files, keys, certificates, signing), FILE_CHECK_S),
            (context.frames.release_others, RELEASE_S),
            (_Reporter(context.admission, report).act, REPORT_S),
        )
    ]
    try:
        _listen_grpc(server, settings, certificates)
        for routes, port, option in (
            (http_routes(context.admission, settings.served, settings.speakers), settings.http_port, "--http-port"),
            (metrics_routes(context.meter, settings.triton_metrics), settings.metrics_port, "--metrics-port"),
        ):
            runners.append(await listen(routes, settings.address, port, option))
        await server.start()
        report({"listening": True})
        async for command in commands:
            await _obey(context, command)
    finally:
        for task in background:
            task.cancel()
        await server.stop(GRACE_S)
        if context.closing:
            await asyncio.wait(context.closing, timeout=CLOSING_S)
        for runner in runners:
            await runner.cleanup()
        await context.pipe.close()
        context.frames.close()


def session_context(settings: GatewaySettings, signing: SigningPair | None = None) -> SessionContext:
    """What the sessions share."""
    pipe = Pipe(settings.triton, settings.limits.answer_s)
    pictures, meter = PictureDecoder(), GatewayMeter(settings.served)

    async def make_avatar(source: AvatarSource) -> tuple[Array, Array, Array]:
        began_s = time.monotonic()
        scene = await pictures.decode(source.picture, settings.height, settings.width, source.masks)
        motion, text = await pipe.encode_avatar(scene.pixels, source.prompt)
        meter.observe(metrics.AVATAR_TIME, time.monotonic() - began_s)
        return motion, text, scene.weights

    context = SessionContext(
        pipe=pipe,
        window=PipeWindow(settings.limits),
        admission=Admission(settings.limits),
        avatars=Avatars(make_avatar, settings.limits),
        options=OptionsReader(settings.height, settings.width, settings.label_font, settings.label),
        meter=meter,
        audit=AuditLog(settings.log_format == "json", settings.log_hashes),
        provenance=ProvenanceWriter(settings.served, settings.operator, None if signing is None else signing.sign),
        speakers=settings.speakers,
        limits=settings.limits,
        control=Control(settings.control),
        frames=FramePool(
            settings.shared_memory,
            settings.limits.lone_blocks + settings.limits.max_sessions,
            settings.height,
            settings.width,
        ),
    )
    context.report()
    return context


def raise_file_limit() -> None:
    """Allows as many open files as this user may have: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _obey(context: SessionContext, command: dict[str, Any]) -> None:
    if "pipe_ready" in command:
        if command["pipe_ready"] and not context.frames.is_registered:
            await context.pipe.register(context.frames)
        context.admission.is_pipe_ready = bool(command["pipe_ready"])
    if "phase" in command:
        context.admission.phase = Phase(command["phase"])
    if "lost" in command:
        text = f"stage {command['lost']} of the server has stopped and is being started again; start a new session."
        lost = PipeError(ErrorCode.FAILED, text)
        if command["lost"] == AVATAR_ENCODER:
            context.pipe.lose_encoder(lost)
        else:
            for session in [*context.live, *context.closing.values()]:
                session.lose(lost)
    context.report()


async def _repeat(act: Callable[[], None], seconds: float) -> None:
    """Acts for ever, whatever happens."""
    while True:
        try:
            act()
        except Exception:
            log.exception("the gateway could not look after itself")
        await asyncio.sleep(seconds)


class _Reporter:
    """Reports the phase, readiness and the number of live sessions: at once when they change, and each second."""

    def __init__(self, admission: Admission, report: Report) -> None:
        self._admission = admission
        self._report = report
        self._told: dict[str, Any] = {}
        self._told_s = 0.0

    def act(self) -> None:
        admission, now_s = self._admission, time.monotonic()
        state = {"phase": admission.phase, "ready": admission.is_ready, "live": admission.live}
        if state != self._told or now_s - self._told_s > SAME_REPORT_S:
            self._report(state)
            self._told, self._told_s = state, now_s


def _check_files(keys: Keys, certificates: Certificates | None, signing: SigningPair | None) -> None:
    """Reads the files of keys and certificates again when they have changed."""
    rings = [keys.callers.reload_if_changed(keys.admin)]
    if keys.admin is not None:
        rings.append(keys.admin.reload_if_changed(keys.callers))
    for key_fault in filter(None, rings):
        log.error("the old keys stay in use: %s", key_fault)
    if certificates is not None and (fault := certificates.reload_if_changed()) is not None:
        log.error("the old certificates stay in use: %s", fault)
    if signing is not None and (fault := signing.reload_if_changed()) is not None:
        log.error("the old signing key stays in use: %s", fault)


def load_keys(settings: GatewaySettings) -> Keys:
    """The keys of callers and operators. Raises `ServerError` for a file that cannot be used."""
    callers = KeyRing() if settings.api_key_file is None else KeyRing.from_file(settings.api_key_file)
    if settings.admin_key_file is None:
        return Keys(callers)
    admin = KeyRing.from_file(settings.admin_key_file)
    if (fault := callers.shared_key(admin)) is not None:
        raise ServerError(fault)
    return Keys(callers, admin)


def load_certificates(settings: GatewaySettings) -> Certificates | None:
    """None without TLS. Raises `ServerError` for files that cannot be used."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    tls = (settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    return Certificates(Access(None, None, *tls))


def load_signing(settings: GatewaySettings) -> SigningPair | None:
    """What signs provenance; None without. Raises `SigningError` for files that cannot be used."""
    certificate, key = settings.sign_certificate, settings.sign_key
    return None if certificate is None or key is None else SigningPair(certificate, key)


def _listen_grpc(server: Any, settings: GatewaySettings, certificates: Certificates | None) -> None:
    target = f"{_bracketed(settings.address)}:{settings.grpc_port}"
    try:
        if certificates is None:
            server.add_insecure_port(target)
        else:
            server.add_secure_port(target, certificates.credentials())
    except RuntimeError as error:
        raise ServerError(
            f"cannot listen on {target} ({str(error).splitlines()[0]}); choose another --grpc-port or --address."
        ) from error


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
