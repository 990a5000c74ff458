"""Checks of the server's options before Triton is started, so that an error names the option to change."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from live_avatar.config import StreamConfig
from live_avatar.errors import ConfigError, ServerError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.memory import host_available_bytes, require_sessions
from live_avatar.serving.gateway_settings import GatewaySettings, Limits, control_folder, metrics_socket, triton_target
from live_avatar.serving.label import Label
from live_avatar.serving.profiles import (
    ALIASES,
    GREATEST_IDLE_S,
    LEAST_IDLE_S,
    Profile,
    load_profile,
    profile_names,
    require_gpus,
)
from live_avatar.serving.served import Served
from live_avatar.serving.server_options import ServerOptions
from live_avatar.signing import read_signer
from live_avatar.version import __version__
from live_avatar.watermark.key import Origin, read_key

log = logging.getLogger(__name__)

SPARE_STREAMS = 64
"""Streams that callers may have beside two for each session. Each may be reading a picture of 32 MiB."""
STARTS_PER_SLOT = 60
"""Sessions that one key may start in a minute, for each session that the server takes at once: the first blocks of a
session have their turn before those of sessions that are ahead."""


def served_profile(options: ServerOptions) -> Profile:
    """The profile that the options ask for, with their limits. Raises `ConfigError` as `load_profile` does."""
    if (current := ALIASES.get(options.profile)) is not None:
        log.warning("Profile %s is now called %s; the old name still works.", options.profile, current)
    profile = load_profile(options.profile)
    return profile.limited(options.max_sessions, options.known_avatars, options.idle_seconds)


def gateway_settings(options: ServerOptions, profile: Profile, scratch: Path) -> GatewaySettings:
    """The gateway's settings for a server in the folder `scratch`."""
    artifacts = load_artifacts(options.artifacts)
    stages, max_sessions = len(profile.chain), profile.max_sessions
    steps_on_cpu = any(place.steps for place in profile.on_cpu)
    limits = Limits(
        max_sessions=max_sessions,
        idle_s=profile.idle_seconds,
        # Steps on a CPU share the cores, so more blocks than cores only wait for one another.
        pipe_blocks=min(stages + 1, max(2, os.cpu_count() or 1)) if steps_on_cpu else stages + 1,
        lone_blocks=stages + 2,
        answer_s=options.answer_seconds,
        known_avatars=profile.known_avatars,
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
        served=Served(__version__, preset.name, artifacts.fingerprint, profile.name, max_sessions),
        height=preset.stream.height,
        width=preset.stream.width,
        speakers=preset.stream.speakers,
        limits=limits,
        api_key_file=_absolute(access.api_key_file),
        admin_key_file=_absolute(access.admin_key_file),
        tls_certificate=_absolute(access.tls_certificate),
        tls_key=_absolute(access.tls_key),
        tls_client_ca=_absolute(access.tls_client_ca),
        label_font=_absolute(options.label_font),
        label=options.label,
        operator=options.operator,
        sign_certificate=_absolute(options.sign_certificate),
        sign_key=_absolute(options.sign_key),
        log_format=options.log_format,
        log_hashes=options.log_hashes,
    )


def _absolute(path: Path | None) -> Path | None:
    """Links stay: a mounted Secret of Kubernetes changes by another target of its links."""
    return path and path.absolute()


def check(options: ServerOptions, profile: Profile) -> None:
    """Raises a `LiveAvatarError` for options that the server cannot start with."""
    artifacts = load_artifacts(options.artifacts)
    _check_steps(profile, artifacts)
    if profile.gpus:
        require_gpus(profile, gpu_count())
    _check_sessions(options, profile, artifacts)
    _check_marking(options, artifacts.preset.stream)
    _check_ports(options)
    _check_trace(options)


def gpu_count() -> int:
    """The NVIDIA GPUs that a process of this server would see."""
    import torch  # here alone: a server of the CPU needs none

    return torch.cuda.device_count()


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


def _check_marking(options: ServerOptions, stream: StreamConfig) -> None:
    """Checks what the server puts on frames and signs."""
    if options.label_font is not None or options.label is not None:
        Label("A" if options.label is None else options.label, stream.height, stream.width, options.label_font)
    require_both("--watermark", options.watermark, "--operator", options.operator)
    require_both("--sign-certificate", options.sign_certificate, "--sign-key", options.sign_key)
    if options.watermark is not None and options.operator is not None:
        read_key(options.watermark)
        Origin(options.operator, 0)
    if options.sign_certificate is not None and options.sign_key is not None:
        read_signer(options.sign_certificate, options.sign_key)


def require_both(first: str, one: object, second: str, other: object) -> None:
    """Raises `ConfigError` if one of two options is given without the other."""
    for given, value, missing, without in ((first, one, second, other), (second, other, first, one)):
        if value is not None and without is None:
            raise ConfigError(f"{given} is {value}, but {missing} is not given; give both, or none.")


def _check_trace(options: ServerOptions) -> None:
    if options.trace is not None:
        try:
            options.trace.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(f"cannot write to {options.trace} ({error.strerror}); choose another --trace.") from error


def _check_sessions(options: ServerOptions, profile: Profile, artifacts: Artifacts) -> None:
    """Checks the limits of sessions. A stage on a GPU checks its memory itself, after its weights were loaded."""
    if options.idle_seconds is not None and not LEAST_IDLE_S <= options.idle_seconds <= GREATEST_IDLE_S:
        raise ServerError(
            f"--idle-seconds is {options.idle_seconds:g}; give {LEAST_IDLE_S:g} to {GREATEST_IDLE_S:g} seconds."
        )
    if stages := [place.memory_stage for place in profile.on_cpu]:
        sessions, avatars, free = profile.max_sessions, profile.known_avatars, host_available_bytes()
        require_sessions(artifacts.preset, sessions, avatars, free, stages, artifacts.contracts)


def _check_steps(profile: Profile, artifacts: Artifacts) -> None:
    serves, exported = profile.step_count, artifacts.preset.stream.steps
    if serves != exported:
        fitting = [name for name in profile_names() if load_profile(name).step_count == exported]
        choose = f"choose --profile {' or '.join(fitting)}, or " if fitting else ""
        raise ServerError(
            f"profile {profile.name} serves {serves} denoising steps, but {artifacts.folder} was exported with "
            f"{exported}; {choose}export with {serves} (`live-avatar export --help`)."
        )
