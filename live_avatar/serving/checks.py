"""Checks of the server's options before Triton is started, so that an error names the option to change."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from live_avatar.errors import ServerError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.memory import host_available_bytes, require_sessions
from live_avatar.serving.gateway_settings import GatewaySettings, Limits, control_folder, metrics_socket, triton_target
from live_avatar.serving.label import Label
from live_avatar.serving.repository import ProfileModels, chain, profiles
from live_avatar.serving.served import Served
from live_avatar.serving.server_options import ServerOptions
from live_avatar.version import __version__

FIRST_STEP = "dit_step_1"
"""The stage whose limits stand for those of the server; all stages have the same."""
SPARE_STREAMS = 64
"""Streams that callers may have beside two for each session. Each may be reading a picture of 32 MiB."""
STARTS_PER_SLOT = 60
"""Sessions that one key may start in a minute, for each session that the server takes at once: the first blocks of a
session have their turn before those of sessions that are ahead."""
LEAST_IDLE_S, GREATEST_IDLE_S = 1.0, 86_400.0


def model_source(options: ServerOptions) -> ProfileModels:
    """The models that the options ask for."""
    return ProfileModels(
        options.model_repository, options.profile, options.max_sessions, options.known_avatars, options.idle_seconds
    )


def gateway_settings(options: ServerOptions, scratch: Path) -> GatewaySettings:
    """The gateway's settings for a server in the folder `scratch`."""
    artifacts = load_artifacts(options.artifacts)
    config = model_source(options).config(FIRST_STEP)
    max_sessions, known_avatars = (int(config.parameters[n].string_value) for n in ("max_sessions", "known_avatars"))
    stages = len(chain(options.model_repository, options.profile))
    on_cpu = config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    limits = Limits(
        max_sessions=max_sessions,
        idle_s=config.sequence_batching.max_sequence_idle_microseconds / 1e6,
        # On a CPU the stages share the cores, so more blocks than cores only wait for one another.
        pipe_blocks=min(stages + 1, max(2, os.cpu_count() or 1)) if on_cpu else stages + 1,
        lone_blocks=stages + 2,
        answer_s=options.answer_seconds,
        known_avatars=known_avatars,
        known_avatar_s=options.known_avatar_seconds,
        share_avatars=options.share_avatars,
        sessions_per_key=options.sessions_per_key,
        starts_per_minute=options.starts_per_minute or STARTS_PER_SLOT * max_sessions,
        session_s=options.longest_session_seconds,
        streams=SPARE_STREAMS + 2 * max_sessions,
    )
    preset, access = artifacts.preset, options.access
    return GatewaySettings(
        triton=triton_target(scratch),
        triton_metrics=metrics_socket(scratch),
        control=control_folder(scratch),
        shared_memory=f"{scratch.name}-frames",
        address=options.address,
        grpc_port=options.grpc_port,
        http_port=options.http_port,
        metrics_port=options.metrics_port,
        served=Served(__version__, preset.name, artifacts.fingerprint, options.profile, max_sessions),
        height=preset.stream.height,
        width=preset.stream.width,
        limits=limits,
        api_key_file=_absolute(access.api_key_file),
        admin_key_file=_absolute(access.admin_key_file),
        tls_certificate=_absolute(access.tls_certificate),
        tls_key=_absolute(access.tls_key),
        tls_client_ca=_absolute(access.tls_client_ca),
        label_font=_absolute(options.label_font),
        log_format=options.log_format,
        log_hashes=options.log_hashes,
    )


def _absolute(path: Path | None) -> Path | None:
    """Links stay: a mounted Secret of Kubernetes changes by another target of its links."""
    return path and path.absolute()


def check(options: ServerOptions) -> None:
    """Raises a `LiveAvatarError` for options that the server cannot start with."""
    artifacts = load_artifacts(options.artifacts)
    known = profiles(options.model_repository)
    if not known:
        raise ServerError(
            f"{options.model_repository} is not the project's model repository; run from a checkout or give "
            "--model-repository."
        )
    if options.profile not in known:
        raise ServerError(f"there is no profile {options.profile!r}; choose one of {', '.join(known)}.")
    _check_steps(options, known, artifacts.preset.stream.steps)
    _check_sessions(options, artifacts)
    _check_ports(options)
    _check_trace(options)


def _check_ports(options: ServerOptions) -> None:
    ports = {
        "--grpc-port": options.grpc_port,
        "--http-port": options.http_port,
        "--metrics-port": options.metrics_port,
    }
    if options.health_port is not None:
        ports["--health-port"] = options.health_port
    if len(set(ports.values())) < len(ports):
        named = ", ".join(f"{option} {port}" for option, port in ports.items())
        raise ServerError(f"{named}: two of these are the same; give each a port of its own.")
    for option, port in ports.items():
        try:
            family, kind, _, _, address = socket.getaddrinfo(options.address, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            raise ServerError(
                f"cannot listen on {options.address}:{port} ({reason}); choose another {option} or --address."
            ) from error


def _check_trace(options: ServerOptions) -> None:
    if options.trace is not None:
        try:
            options.trace.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(f"cannot write to {options.trace} ({error.strerror}); choose another --trace.") from error


def _check_sessions(options: ServerOptions, artifacts: Artifacts) -> None:
    """Checks the limits of sessions. A stage on a GPU checks its memory itself, after its weights were loaded."""
    if options.idle_seconds is not None and not LEAST_IDLE_S <= options.idle_seconds <= GREATEST_IDLE_S:
        raise ServerError(
            f"--idle-seconds is {options.idle_seconds:g}; give {LEAST_IDLE_S:g} to {GREATEST_IDLE_S:g} seconds."
        )
    if options.label_font is not None:
        Label("A", artifacts.preset.stream.height, artifacts.preset.stream.width, options.label_font)
    step = model_source(options).config(FIRST_STEP)
    if step.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU:
        sessions, avatars = (int(step.parameters[n].string_value) for n in ("max_sessions", "known_avatars"))
        require_sessions(artifacts.preset, sessions, avatars, host_available_bytes(), agreed=artifacts.contracts)


def _check_steps(options: ServerOptions, known: list[str], exported: int) -> None:
    steps = {profile: _step_count(chain(options.model_repository, profile)) for profile in known}
    if steps[options.profile] != exported:
        fitting = [profile for profile in known if steps[profile] == exported]
        choose = f"choose --profile {' or '.join(fitting)}, or " if fitting else ""
        raise ServerError(
            f"profile {options.profile} serves {steps[options.profile]} denoising steps, but {options.artifacts} was "
            f"exported with {exported}; {choose}export with {steps[options.profile]} (`live-avatar export --help`)."
        )


def _step_count(models: list[str]) -> int:
    return sum(model.startswith("dit_step_") for model in models)
