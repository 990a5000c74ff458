"""The command line: `live-avatar generate | export | serve | stream | say | web | talk | demo | verify ...`.

Each command turns its options into one call. A user error prints one sentence and exits with code 2; Ctrl-C exits
with 130. Heavy imports are inside the commands, so that `stream` starts without torch.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from live_avatar import interrupts
from live_avatar.cli.checkpoint_options import chosen_checkpoint, model_options, stream_options
from live_avatar.cli.keys import keys
from live_avatar.cli.marks import (
    credentials_of,
    signing_key,
    signing_options,
    verify,
    watermark_key,
    watermark_options,
)
from live_avatar.cli.options import (
    FILE,
    Integer,
    artifacts_option,
    capability_option,
    connection_arguments,
    connection_options,
    listening_address,
    speech_options,
)
from live_avatar.cli.terminal import say, shown, warnings_said
from live_avatar.cli.web import say_text, talk, web
from live_avatar.errors import ArtifactError, LiveAvatarError
from live_avatar.graphs.flavours import FLAVOURS
from live_avatar.version import __version__
from live_avatar_client.errors import AvatarError

if TYPE_CHECKING:
    from live_avatar.exporter.quantization import Scaling
    from live_avatar.graphs.artifacts import Artifacts
    from live_avatar.runtime import Runtime

USER_ERROR, INTERRUPTED = 2, 130
LOG_FLUSH_S = 1.0


class _Commands(click.Group):
    """Turns the project's exceptions into one sentence on stderr."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        interrupts.install()
        try:
            with warnings_said():
                super().main(*args, **{**kwargs, "standalone_mode": False})
        except (LiveAvatarError, AvatarError) as error:
            _fail(str(error))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(USER_ERROR)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "live-avatar"
            _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`.")
        except OSError as error:  # the file system, if no caller nearer to the file handled it; stdout included
            if error.filename is None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python reports the unwritten output at exit
            place = error.filename or "standard output"
            _fail(f"{place}: {error.strerror}; use a writable path with free space.")
        except (KeyboardInterrupt, click.Abort):
            say("Interrupted.", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(0)


def _fail(sentence: str) -> NoReturn:
    say(f"Error: {sentence}", err=True)
    sys.exit(USER_ERROR)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Stream a talking video from a picture and speech."""


for command in (keys, verify, watermark_key, signing_key, web, talk, say_text):
    main.add_command(command)


@main.command()
@model_options
@artifacts_option(required=False)
@stream_options
@watermark_options
@signing_options("the MP4 with a C2PA manifest")
@speech_options
def generate(
    artifacts: Path | None,
    audio: tuple[Path, ...],
    masks: tuple[str, ...],
    image: Path,
    prompt: str,
    seed: int,
    output: Path,
    frames_output: Path | None,
    watermark: Path | None,
    operator: int | None,
    sign_certificate: Path | None,
    sign_key: Path | None,
    **model: Any,
) -> None:
    """Make a video in this process, without a server (Algorithm 3).

    With --artifacts the exported graphs run, and the frames equal those of a server of these artifacts.
    Without it the same networks run in torch.
    """
    from live_avatar.cli.demo import frame_bar
    from live_avatar.cli.generated import Markings
    from live_avatar.cli.speeches import read_speeches
    from live_avatar.inputs.image import crop_warning
    from live_avatar.pipeline.generator import Generator
    from live_avatar.serving.provenance import ContentHashes
    from live_avatar_client.media import read_image_bytes
    from live_avatar_client.video import SpeechVideo

    given = [
        f"--{name.replace('_', '-')}"
        for name, value in model.items()
        if name != "preset_name" and value is not None and value is not False
    ]
    if artifacts is not None and given:
        raise click.UsageError(f"--artifacts already fixes {', '.join(given)}; leave that out")
    markings, credentials = Markings.read(watermark, operator), credentials_of(sign_certificate, sign_key)
    speech, picture = read_speeches(audio, masks), read_image_bytes(image)

    def metadata() -> dict[str, str]:
        fingerprint = None if artifacts is None else _artifacts_of(artifacts, None).fingerprint
        contents = ContentHashes.of(picture, prompt, speech.masks)
        return markings.metadata(generator.preset.name, fingerprint, contents, seed)

    with (
        SpeechVideo(output, speech.track, frames_output, metadata=metadata, credentials=credentials) as video,
        frame_bar("video", video) as bar,
    ):
        generator = Generator(_runtime(artifacts, model))
        if warning := crop_warning(picture, generator.preset.stream.height, generator.preset.stream.width):
            click.echo(f"Warning: {warning}", err=True)
        for block in generator.generate(picture, prompt, seed, speech.samples, speech.masks):
            video.write(markings.mark(block.frames))
            bar.update(len(block.frames))
            interrupts.check()
    say(f"Wrote {output} ({video.expected_frames} frames{markings.told}).")


def _runtime(artifacts: Path | None, model: dict[str, Any]) -> Runtime:
    if artifacts is not None:
        from live_avatar.runtime.onnx_runtime import OnnxRuntime

        return OnnxRuntime(_artifacts_of(artifacts, model["preset_name"]))
    from live_avatar.runtime.torch_runtime import TorchRuntime

    return TorchRuntime(chosen_checkpoint(**model))


def _artifacts_of(folder: Path, preset_name: str | None) -> Artifacts:
    from live_avatar.graphs.artifacts import load_artifacts

    artifacts = load_artifacts(folder)
    if preset_name not in (None, artifacts.preset.name):
        raise ArtifactError(
            f"{folder} holds preset {artifacts.preset.name!r}, not {preset_name!r}; "
            f"give --preset {artifacts.preset.name} or export {preset_name}."
        )
    return artifacts


@main.command()
@model_options
@stream_options
@click.option(
    "--target",
    type=click.Choice(["onnx", *FLAVOURS]),
    default="onnx",
    show_default=True,
    help="tensorrt: bfloat16 graphs, and engines for the GPU of this machine; tensorrt-rtx: the same, or with "
    "--compute-capability engines for other GPUs.",
)
@capability_option
@click.option(
    "--gpu-memory-gib",
    type=float,
    help="With engines: memory of one GPU. A model that does not fit is refused before the export.",
)
@click.option(
    "--fp8",
    metavar="dynamic|FILE",
    help="The transformer's large linears become FP8. dynamic: their inputs are scaled in every run, each token on its "
    "own; FILE: by a calibration that `python -m export.calibrate` made.",
)
@click.option("--output", type=FILE, required=True, help="Artifacts folder to write; an existing one is replaced.")
def export(
    target: str,
    capabilities: tuple[str, ...],
    gpu_memory_gib: float | None,
    fp8: str | None,
    output: Path,
    **model: Any,
) -> None:
    """Export a preset as ONNX graphs, shared weights and a manifest; for GPUs also as engines."""
    from live_avatar.cli.demo import export_with_progress

    scaling = None if fp8 is None else _scaling(fp8)
    if target == "onnx":
        for option, given in (("--gpu-memory-gib", gpu_memory_gib), ("--compute-capability", capabilities or None)):
            if given is not None:
                raise click.UsageError(f"{option} is for --target {' or '.join(FLAVOURS)}; leave it out")
        artifacts = export_with_progress(partial(chosen_checkpoint, **model), output, scaling)
    else:
        from live_avatar.exporter.engines import EngineOptions, build_engines, require_compiler
        from live_avatar.graphs.memory import require_room

        checkpoint = chosen_checkpoint(**{**model, "precision": model["precision"] or "bfloat16"})
        if gpu_memory_gib is not None:
            require_room(checkpoint.preset, gpu_memory_gib, sessions=1, fp8=scaling is not None)
        options = EngineOptions(FLAVOURS[target], capabilities)
        require_compiler(options, checkpoint.preset, scaling is not None)
        artifacts = export_with_progress(lambda: checkpoint, output, scaling)
        build_engines(output, options, say)
    say(f"Wrote {output} (preset {artifacts.preset.name}, {artifacts.fingerprint}).")


def _scaling(fp8: str) -> Scaling:
    from live_avatar.exporter.quantization import read_scaling

    return read_scaling(fp8)


@main.command()
@artifacts_option(required=True)
@click.option(
    "--profile",
    default="cpu",
    show_default=True,
    help="Hardware profile, which says what runs on which device: a name, or a file of your own (NAME.toml).",
)
@click.option(
    "--address", callback=listening_address, default="127.0.0.1", show_default=True, help="Address to listen on."
)
@click.option("--grpc-port", type=Integer(1, 65535), default=8001, show_default=True, help="Port of the stream.")
@click.option(
    "--http-port",
    type=Integer(1, 65535),
    default=8000,
    show_default=True,
    help="Port of health and metadata.",
)
@click.option(
    "--health-port",
    type=Integer(1, 65535),
    help="A port for probes alone, served by another process than the callers' ports; default: none.",
)
@click.option(
    "--metrics-port", type=Integer(1, 65535), default=8002, show_default=True, help="Port of Prometheus metrics."
)
@click.option("--max-sessions", type=Integer(min=1), help="Maximum concurrent sessions; default: from the profile.")
@click.option(
    "--known-avatars",
    type=Integer(min=0),
    help="Avatars that each stage caches, for a faster start; default: from the profile.",
)
@click.option(
    "--known-avatar-seconds",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="How long the avatar of a caller is remembered after its last use.",
)
@click.option(
    "--share-avatars",
    is_flag=True,
    help="Without API keys: remember avatars for all callers together, not for each connection. A caller can then tell "
    "by time whether somebody else has used a picture and prompt.",
)
@click.option("--sessions-per-key", type=Integer(min=1), help="Maximum concurrent sessions of one API key.")
@click.option(
    "--starts-per-minute",
    type=Integer(min=1),
    help="Sessions that one API key may start within a minute; default: 60 for each of --max-sessions.",
)
@click.option(
    "--longest-session-seconds", type=click.FloatRange(min=1), help="A session that lasts this long is ended."
)
@click.option(
    "--answer-seconds",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    help="How long a block may take in the server: then its session ends with an error, and a stage that is stuck is "
    "started again.",
)
@click.option(
    "--idle-seconds",
    type=float,
    help="A session that sends nothing for this long is dropped; default: from the profile (30).",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="How long live sessions may continue after SIGTERM.",
)
@click.option("--label-font", type=FILE, help="Font of visible labels; needed for letters beyond ASCII.")
@click.option(
    "--label", help="Text drawn on every frame of all sessions, such as AI-generated; callers cannot change it."
)
@watermark_options
@signing_options("the provenance of every session")
@click.option(
    "--api-key-file", type=FILE, help="File with the API keys of callers; read again when it changes. See `keys`."
)
@click.option("--admin-key-file", type=FILE, help="File with the key for the model's statistics and configuration.")
@click.option("--tls-certificate", type=FILE, help="The server's certificate (PEM); gRPC then uses TLS.")
@click.option("--tls-key", type=FILE, help="Private key of --tls-certificate (PEM).")
@click.option(
    "--tls-client-ca", type=FILE, help="Certificate authority (PEM) that must have signed every client certificate."
)
@click.option(
    "--log-format",
    type=click.Choice(["plain", "json"]),
    default="plain",
    show_default=True,
    help="Form of the lines on stderr; json: each line is an object.",
)
@click.option("--log-hashes", is_flag=True, help="Add SHA-256 hashes of picture and prompt to those lines.")
@click.option("--trace", type=FILE, help="Folder for the busy intervals of each stage.")
@click.option("--verbose", is_flag=True, help="Show Triton's full log.")
def serve(
    artifacts: Path,
    drain_seconds: float,
    api_key_file: Path | None,
    admin_key_file: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    **options: Any,
) -> None:
    """Serve artifacts with Triton until Ctrl-C; SIGTERM lets live sessions finish first."""
    from live_avatar.cli.places import require_places
    from live_avatar.serving.access import Access, access_warnings
    from live_avatar.serving.foreground import run_until_signal
    from live_avatar.serving.log_relay import LogRelay, json_line
    from live_avatar.serving.server import is_for_operators, serving
    from live_avatar.serving.server_options import ServerOptions

    access = Access(api_key_file, admin_key_file, tls_certificate, tls_key, tls_client_ca)
    chosen = ServerOptions(artifacts, access=access, **options)
    require_places(artifacts=artifacts, label_font=chosen.label_font, watermark=chosen.watermark, trace=chosen.trace)
    ready = False
    as_json = chosen.log_format == "json"
    relay = LogRelay(sys.stderr, form=json_line if as_json else str)

    def echo(line: str) -> None:
        if chosen.verbose or (ready and is_for_operators(line)):
            relay.write(shown(line))

    logging.basicConfig(level=logging.INFO, handlers=[relay.handler()], format="%(message)s")
    try:
        with serving(chosen, echo) as server:
            ready = True
            for warning in access_warnings(access, chosen.address):
                relay.write(f"Warning: {shown(warning)}")
            say(f"Serving {artifacts} with profile {chosen.profile} on {chosen.url} (press Ctrl-C to stop).")
            run_until_signal(server, drain_seconds, say)
    except KeyboardInterrupt:
        pass
    except LiveAvatarError as error:
        if not as_json:
            raise
        relay.write(f"Error: {shown(str(error))}")
        sys.exit(USER_ERROR)
    finally:
        relay.close(LOG_FLUSH_S)
    say("Stopped.")


@main.command()
@click.option("--profile", default="cpu", show_default=True, help="Hardware profile: a name, or a file (NAME.toml).")
@click.option("--output", type=FILE, required=True, help="Folder to write; it must be new or empty.")
def repository(profile: str, output: Path) -> None:
    """Write the Triton model repository of a profile, for a Triton that you start yourself."""
    from live_avatar.serving.profiles import load_profile
    from live_avatar.serving.repository import write_new_repository

    chosen = load_profile(profile)
    write_new_repository(chosen, output)
    say(f"Wrote {output} (profile {chosen.name}).")


@main.command()
@click.option("--url", default="localhost:8001", show_default=True, help="host:port of the server's gRPC port.")
@click.option(
    "--pace",
    type=click.Choice(["fast", "realtime"]),
    default="fast",
    show_default=True,
    help="fast: send the speech at once; realtime: as spoken, in chunks of 20 ms.",
)
@click.option("--label", default="", help="Text drawn on every frame, such as AI-generated.")
@signing_options("the MP4 with a C2PA manifest")
@connection_options
@speech_options
def stream(
    url: str,
    pace: str,
    label: str,
    audio: tuple[Path, ...],
    masks: tuple[str, ...],
    image: Path,
    prompt: str,
    seed: int,
    output: Path,
    frames_output: Path | None,
    sign_certificate: Path | None,
    sign_key: Path | None,
    **connection: Path | None,
) -> None:
    """Send speech to a server and write the video that it returns."""
    from live_avatar.cli.demo import frame_bar, session_video, stream_to_file
    from live_avatar.cli.speeches import read_speeches
    from live_avatar_client.media import read_image_bytes
    from live_avatar_client.sync import AvatarSession

    credentials = credentials_of(sign_certificate, sign_key)
    speech, picture = read_speeches(audio, masks), read_image_bytes(image)
    session = AvatarSession(
        url,
        image=picture,
        prompt=prompt,
        seed=seed,
        label=label,
        speakers=speech.speakers,
        **connection_arguments(**connection),
    )
    with (
        session_video(session, output, speech.track, frames_output, credentials) as video,
        frame_bar("video", video) as bar,
    ):
        stats = stream_to_file(session, speech.samples, pace == "realtime", video, bar.update)
    say(f"Wrote {output} ({stats.frames} frames).")
    say(f"FPS {stats.fps:.1f}, TTFF {stats.ttff_s:.2f} s, audio-to-frame latency {stats.latency_p50_s:.2f} s")


@main.command()
@click.argument("url")
@connection_options
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON; unknown values are null.")
def doctor(url: str, for_scripts: bool, **connection: Path | None) -> None:
    """Report the status of the server at URL (host:port of its gRPC port).

    Exit code 0: a session can be opened now. 1: the server is up, but not ready, full or shutting down, or it
    expects an API key or a different one. 2: no server answers, or an option is wrong.
    """
    from live_avatar.cli.doctor import as_json, as_lines, exit_code
    from live_avatar_client.status import server_status

    status = server_status(url, **connection_arguments(**connection))
    say(as_json(status) if for_scripts else "\n".join(as_lines(status)))
    sys.exit(exit_code(status))


@main.command()
@click.option(
    "--artifacts",
    type=FILE,
    default="artifacts/tiny",
    show_default=True,
    help="Exported if it is missing.",
)
@click.option("--output", type=FILE, default="out/demo.mp4", show_default=True, help="MP4 file to write.")
@click.option("--trace", type=FILE, help="Also write the stages' busy intervals as a Chrome trace (JSON).")
@click.option("--report", type=FILE, help="Also write the measurements and the hardware as JSON.")
def demo(artifacts: Path, output: Path, trace: Path | None, report: Path | None) -> None:
    """Export, serve and stream the bundled speech and picture, and report the speed."""
    from live_avatar.cli.demo import run_demo

    run_demo(artifacts, output, trace, report)
