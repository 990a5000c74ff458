"""The command line: `live-avatar generate | export | serve | stream | doctor | demo`.

Thin: each command turns options into one call. A mistake of the user ends with one sentence and exit code 2,
Ctrl-C with 130. Heavy imports stand inside the commands, so that `stream` starts without torch.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from live_avatar import interrupts
from live_avatar.config import PRECISIONS, PRESETS, Preset, StreamConfig, preset
from live_avatar.errors import ArtifactError, LiveAvatarError
from live_avatar.version import __version__
from live_avatar_client.errors import AvatarError
from live_avatar_client.protocol import MAX_SEED

if TYPE_CHECKING:
    from live_avatar.graphs.artifacts import Artifacts
    from live_avatar.runtime import Runtime
    from live_avatar.serving.server import TritonServer
    from live_avatar.weights.tensors import Checkpoint

F = TypeVar("F", bound=Callable[..., Any])

USER_ERROR, INTERRUPTED = 2, 130
FILE = click.Path(path_type=Path)


class _Integer(click.IntRange):
    name = "integer"  # click would say of 1.5 that it is no valid integer range


class _Commands(click.Group):
    """Turns the project's exceptions into one sentence on stderr."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        interrupts.install()
        try:
            super().main(*args, **{**kwargs, "standalone_mode": False})
        except (LiveAvatarError, AvatarError) as error:
            _fail(str(error))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(USER_ERROR)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "live-avatar"
            _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`.")
        except OSError as error:  # the file system, where no one closer to the file knew better; stdout included
            if error.filename is None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains about the unwritten rest at its end
            place = error.filename or "standard output"
            _fail(f"{place}: {error.strerror}; use a path that exists and is writable, with room left.")
        except (KeyboardInterrupt, click.Abort):
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(0)


def _fail(sentence: str) -> NoReturn:
    click.echo(f"Error: {sentence}", err=True)
    sys.exit(USER_ERROR)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that adds several options, of which the last is shown first."""

    def add(command: F) -> F:
        for option in options:
            command = option(command)
        return command

    return add


# What `generate` and `stream` have in common.
_speech_options = _options(
    click.option(
        "--frames-output", type=FILE, help="Also write the raw frames, uint8 [frames, H, W, 3], to this .npy."
    ),
    click.option("--output", type=FILE, required=True, help="MP4 file to write: H.264 video, AAC speech."),
    click.option(
        "--seed",
        type=_Integer(0, MAX_SEED),
        default=0,
        show_default=True,
        help="Same seed, same inputs: same frames.",
    ),
    click.option("--prompt", default="", help="What the scene and the person are like."),
    click.option("--image", type=FILE, required=True, help="Picture of the person: PNG, JPEG or WebP."),
    click.option("--audio", type=FILE, required=True, help="Speech: any file that FFmpeg reads, resampled to 16 kHz."),
)


# How `stream` and `doctor` reach a server that asks for a key or speaks TLS.
_connection_options = _options(
    click.option("--tls-key", type=FILE, help="Private key of --tls-certificate (PEM)."),
    click.option("--tls-certificate", type=FILE, help="Certificate of this client, if the server asks for one (PEM)."),
    click.option(
        "--tls-ca",
        type=FILE,
        help="Authority of the server's certificate (PEM); for a public one put grpcs:// in front of the address.",
    ),
    click.option("--api-key-file", type=FILE, help="File with the server's API key."),
)


def _connection(
    api_key_file: Path | None, tls_ca: Path | None, tls_certificate: Path | None, tls_key: Path | None
) -> dict[str, Any]:
    """The client's `api_key` and `tls`."""
    from live_avatar.serving.access import read_key
    from live_avatar_client.tls import TLS

    given = any(path is not None for path in (tls_ca, tls_certificate, tls_key))
    return {
        "api_key": None if api_key_file is None else read_key(api_key_file),
        "tls": TLS(tls_ca, tls_certificate, tls_key) if given else None,
    }


def _artifacts_option(required: bool) -> Callable[[F], F]:
    return click.option(
        "--artifacts", type=FILE, required=required, help="Folder made by `live-avatar export`, run on ONNX Runtime."
    )


# Which networks, with which weights, at which size; None keeps what the preset says.
_model_options = _options(
    click.option(
        "--like",
        type=FILE,
        help="Take height and width from this picture: its shape, in steps of 64 pixels, within the preset's area.",
    ),
    click.option("--width", type=_Integer(min=1), help="Width of the video in pixels, a multiple of 16."),
    click.option("--height", type=_Integer(min=1), help="Height of the video in pixels, a multiple of 16."),
    click.option("--precision", type=click.Choice(PRECISIONS), help="Type of large weights, activations and caches."),
    click.option(
        "--lora-alpha", type=float, help="The adapter's alpha, where the file does not say it (64 for the release)."
    ),
    click.option("--lora", type=FILE, help="Adapter (safetensors) to merge into the transformer's weights."),
    click.option(
        "--checkpoint",
        type=FILE,
        help="Folder with the weights, such as the official download; else the package's own, or random ones.",
    ),
    click.option(
        "--preset",
        "preset_name",
        type=click.Choice(sorted(PRESETS)),
        help="Which system; without it the one that --checkpoint describes, or tiny.",
    ),
)


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 1,0.5,0") from error


# How the stream of a preset runs; None keeps the preset's value.
_stream_options = _options(
    click.option(
        "--lookahead-ms",
        type=_Integer(min=0),
        help="Future speech that a frame may depend on, a multiple of 40; delays the video by as much.",
    ),
    click.option(
        "--sink-update-block",
        type=_Integer(min=0),
        help="First block that attends to the model's own first frame: 2 is the paper's Algorithm 4, 5 costs no "
        "wait in the pipeline, 0 never.",
    ),
    click.option("--steps", type=_Integer(min=1), help="Denoising steps, with the released schedule for as many."),
    click.option(
        "--sigmas",
        callback=_numbers,
        help="Noise levels instead, from at most 1 falling to 0: one more than steps, such as 1,0.8577,0.6022,0.",
    ),
    click.option("--drop-idle-step", is_flag=True, help="Without the last step, which hardly moves: one GPU less."),
)


def _opened(
    preset_name: str | None,
    checkpoint: Path | None,
    lora: Path | None,
    lora_alpha: float | None,
    precision: str | None,
    height: int | None,
    width: int | None,
    like: Path | None,
    **stream: Any,
) -> Checkpoint:
    """The checkpoint that the options of `_model_options` and `_stream_options` choose."""
    from live_avatar.weights.checkpoint import open_checkpoint
    from live_avatar.weights.lora import LoRA

    if lora is None and lora_alpha is not None:
        raise click.UsageError("--lora-alpha is nothing without --lora; give the adapter's file")
    found = open_checkpoint(
        None if preset_name is None else preset(preset_name),
        checkpoint,
        None if lora is None else LoRA(lora, alpha=lora_alpha),
    )
    size = _size(found.preset, height, width, like)
    chosen = found.preset.with_stream(**size, **_stream_changes(found.preset.stream, **stream))
    return dataclasses.replace(found, preset=chosen.with_precision(precision or chosen.precision))


def _size(chosen: Preset, height: int | None, width: int | None, like: Path | None) -> dict[str, int]:
    if like is not None:
        from live_avatar.inputs.image import area_size, picture_size
        from live_avatar_client.media import read_image_bytes

        if height is not None or width is not None:
            raise click.UsageError("--like decides height and width; leave --height and --width out")
        area = chosen.stream.height * chosen.stream.width
        height, width = area_size(*picture_size(read_image_bytes(like)), area)
    given = {"height": height, "width": width}
    return {name: value for name, value in given.items() if value is not None}


def _stream_changes(
    stream: StreamConfig,
    lookahead_ms: int | None,
    sink_update_block: int | None,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    drop_idle_step: bool,
) -> dict[str, Any]:
    if sum((steps is not None, sigmas is not None, drop_idle_step)) > 1:
        raise click.UsageError("--steps, --sigmas and --drop-idle-step each settle the schedule; give one of them")
    changes: dict[str, Any] = {}
    if lookahead_ms is not None:
        changes["lookahead_ms"] = lookahead_ms
    if sink_update_block is not None:
        changes["sink_update_block"] = sink_update_block or None
    if steps is not None:
        changes |= {"steps": steps, "sigmas": None}
    if sigmas is not None:
        changes |= {"steps": len(sigmas) - 1, "sigmas": sigmas}
    if drop_idle_step:
        from live_avatar.model.schedule import without_idle_step

        shorter = without_idle_step(stream)
        changes |= {"steps": shorter.steps, "sigmas": shorter.sigmas}
    return changes


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """A picture and speech in, a talking video out, as a stream."""


@main.command()
@_model_options
@_artifacts_option(required=False)
@_stream_options
@_speech_options
def generate(
    artifacts: Path | None,
    audio: Path,
    image: Path,
    prompt: str,
    seed: int,
    output: Path,
    frames_output: Path | None,
    **model: Any,
) -> None:
    """Make a video in this process, without a server (Algorithm 3).

    With --artifacts the exported graphs run, and the frames are the very ones that a server of these
    artifacts sends; without, the same networks run in torch.
    """
    from live_avatar.cli.demo import frame_bar
    from live_avatar.pipeline.generator import Generator
    from live_avatar_client.media import read_image_bytes, read_speech
    from live_avatar_client.video import SpeechVideo

    given = [
        f"--{name.replace('_', '-')}"
        for name, value in model.items()
        if name != "preset_name" and value is not None and value is not False
    ]
    if artifacts is not None and given:
        raise click.UsageError(f"--artifacts were exported with their own {', '.join(given)}; leave that out")
    speech, picture = read_speech(audio), read_image_bytes(image)
    with SpeechVideo(output, speech, frames_output) as video, frame_bar("video", video) as bar:
        for block in Generator(_runtime(artifacts, model)).generate(picture, prompt, seed, speech):
            video.write(block.frames)
            bar.update(len(block.frames))
            interrupts.check()
    click.echo(f"Wrote {output} ({video.expected_frames} frames).")


def _runtime(artifacts: Path | None, model: dict[str, Any]) -> Runtime:
    if artifacts is not None:
        from live_avatar.runtime.onnx_runtime import OnnxRuntime

        return OnnxRuntime(_artifacts_of(artifacts, model["preset_name"]))
    from live_avatar.runtime.torch_runtime import TorchRuntime

    return TorchRuntime(_opened(**model))


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
@_model_options
@_stream_options
@click.option(
    "--target",
    type=click.Choice(["onnx", "tensorrt"]),
    default="onnx",
    show_default=True,
    help="tensorrt: bfloat16 graphs, and engines for the GPU of this machine beside them.",
)
@click.option(
    "--gpu-memory-gib",
    type=float,
    help="With tensorrt, memory of one GPU: what would not fit is refused at the start, and the prefill's weights stay "
    "on the host if that is what makes it fit.",
)
@click.option(
    "--fp8",
    type=FILE,
    help="Calibration made by `python -m export.calibrate`: the transformer's large linears become FP8.",
)
@click.option("--output", type=FILE, required=True, help="Artifacts folder to make, or to make again.")
def export(target: str, gpu_memory_gib: float | None, fp8: Path | None, output: Path, **model: Any) -> None:
    """Compile a preset to ONNX graphs, shared weights and a manifest, and for GPUs to TensorRT engines."""
    from live_avatar.cli.demo import export_with_progress
    from live_avatar.exporter.quantization import Calibration

    calibration = None if fp8 is None else Calibration.read(fp8)
    if target == "onnx":
        if gpu_memory_gib is not None:
            raise click.UsageError("--gpu-memory-gib is for --target tensorrt; leave it out")
        artifacts = export_with_progress(_opened(**model), output, calibration)
    else:
        from live_avatar.exporter.engines import EngineOptions, build_engines, require_tensorrt
        from live_avatar.graphs.memory import fitting_on_host

        checkpoint = _opened(**{**model, "precision": model["precision"] or "bfloat16"})
        on_host = fitting_on_host(checkpoint.preset, gpu_memory_gib, sessions=1, fp8=calibration is not None)
        require_tensorrt()
        artifacts = export_with_progress(checkpoint, output, calibration)
        build_engines(output, EngineOptions(weights_on_host=on_host), click.echo)
    click.echo(f"Wrote {output} (preset {artifacts.preset.name}, {artifacts.fingerprint}).")


@main.command()
@_artifacts_option(required=True)
@click.option("--profile", default="cpu", show_default=True, help="Hardware profile: which model runs where.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--grpc-port", type=_Integer(1, 65535), default=8001, show_default=True, help="Port of the stream.")
@click.option("--http-port", type=_Integer(1, 65535), default=8000, show_default=True, help="Port of health checks.")
@click.option(
    "--metrics-port", type=_Integer(1, 65535), default=8002, show_default=True, help="Port of Prometheus metrics."
)
@click.option(
    "--model-repository", type=FILE, help="Triton models to serve; without it those of the checkout this runs from."
)
@click.option("--max-sessions", type=_Integer(min=1), help="Sessions at once; without it as the profile says.")
@click.option(
    "--known-avatars",
    type=_Integer(min=0),
    help="Avatars that each stage remembers, so that they start sooner; without it as the profile says.",
)
@click.option(
    "--idle-seconds",
    type=float,
    help="A session that sends nothing for so long is dropped; without it as the profile says (30).",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="At SIGTERM, how long live sessions may run on.",
)
@click.option("--label-font", type=FILE, help="Font for visible labels, if they need letters beyond ASCII.")
@click.option("--api-key-file", type=FILE, help="File with the key that callers must send.")
@click.option("--admin-key-file", type=FILE, help="File with the key that statistics, logging and trace need.")
@click.option("--tls-certificate", type=FILE, help="The server's certificate (PEM): gRPC speaks TLS.")
@click.option("--tls-key", type=FILE, help="Its private key (PEM).")
@click.option("--tls-client-ca", type=FILE, help="Authority (PEM) that must have signed every client's certificate.")
@click.option("--trace", type=FILE, help="Folder in which each stage writes its busy intervals.")
@click.option("--verbose", is_flag=True, help="Show all of Triton's own log.")
def serve(
    artifacts: Path,
    drain_seconds: float,
    model_repository: Path | None,
    api_key_file: Path | None,
    admin_key_file: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    **options: Any,
) -> None:
    """Serve artifacts with Triton until Ctrl-C, or until SIGTERM and the end of the live sessions."""
    from live_avatar.serving.access import Access, access_warnings
    from live_avatar.serving.server import MODEL_REPOSITORY, ServerOptions, is_for_operators, serving

    access = Access(api_key_file, admin_key_file, tls_certificate, tls_key, tls_client_ca)
    chosen = ServerOptions(artifacts, model_repository=model_repository or MODEL_REPOSITORY, access=access, **options)
    ready = False

    def echo(line: str) -> None:
        if chosen.verbose or (ready and is_for_operators(line)):
            click.echo(line, err=True)

    try:
        with serving(chosen, echo) as server:
            ready = True
            for warning in access_warnings(access, chosen.address):
                click.echo(f"Warning: {warning}", err=True)
            click.echo(f"Serving {artifacts} with profile {chosen.profile} on {chosen.url} (Ctrl-C ends it).")
            _watch(server, drain_seconds)
    except KeyboardInterrupt:
        pass
    click.echo("Stopped.")


def _watch(server: TritonServer, drain_seconds: float) -> None:
    """Until Ctrl-C; SIGTERM drains first, and a further signal ends that."""
    from live_avatar.errors import ServerError

    try:
        while server.is_running():
            time.sleep(0.2)
        raise ServerError(f"Triton ended by itself with code {server.process.returncode}:\n{server.errors()}")
    except KeyboardInterrupt:
        if not interrupts.is_termination():
            raise
        interrupts.install()
        click.echo(f"Draining: no new sessions, and {drain_seconds:g} s for the live ones.")
        ended = server.drain(drain_seconds)
        interrupts.ignore()
        click.echo("All sessions have ended." if ended else "The time is up; the last sessions were told to reconnect.")


@main.command()
@click.option("--url", default="localhost:8001", show_default=True, help="host:port of the server's gRPC port.")
@click.option(
    "--pace",
    type=click.Choice(["fast", "realtime"]),
    default="fast",
    show_default=True,
    help="Send the speech at once, or as it would be spoken, in chunks of 20 ms.",
)
@click.option("--label", default="", help="Text to draw on every frame, such as AI-generated.")
@_connection_options
@_speech_options
def stream(
    url: str,
    pace: str,
    label: str,
    audio: Path,
    image: Path,
    prompt: str,
    seed: int,
    output: Path,
    frames_output: Path | None,
    **connection: Path | None,
) -> None:
    """Send speech to a server and write the video that comes back."""
    from live_avatar.cli.demo import frame_bar, session_video, stream_to_file
    from live_avatar_client.media import read_image_bytes, read_speech
    from live_avatar_client.sync import AvatarSession

    speech, picture = read_speech(audio), read_image_bytes(image)
    session = AvatarSession(url, image=picture, prompt=prompt, seed=seed, label=label, **_connection(**connection))
    with session_video(session, output, speech, frames_output) as video, frame_bar("video", video) as bar:
        stats = stream_to_file(session, speech, pace == "realtime", video, bar.update)
    click.echo(f"Wrote {output} ({stats.frames} frames).")
    click.echo(f"FPS {stats.fps:.1f}, TTFF {stats.ttff_s:.2f} s, audio-to-frame latency {stats.latency_p50_s:.2f} s")


@main.command()
@click.argument("url")
@_connection_options
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON, with null for what is not known.")
def doctor(url: str, for_scripts: bool, **connection: Path | None) -> None:
    """Say how the server at URL (host:port of its gRPC port) is.

    Exit code 0: a session could be opened now. 1: the server is up, but not ready, full, shutting down, or wants
    a key or another one. 2: no server answers, or an option is wrong.
    """
    from live_avatar.cli.doctor import as_json, as_lines, exit_code
    from live_avatar_client.status import server_status

    status = server_status(url, **_connection(**connection))
    click.echo(as_json(status) if for_scripts else "\n".join(as_lines(status)))
    sys.exit(exit_code(status))


@main.command()
@click.option("--artifacts", type=FILE, default="artifacts/tiny", show_default=True, help="Made if it is not there.")
@click.option("--output", type=FILE, default="out/demo.mp4", show_default=True, help="MP4 file to write.")
@click.option("--trace", type=FILE, help="Also write the stages' busy intervals as a Chrome trace (JSON).")
@click.option("--report", type=FILE, help="Also write what was measured, and on what, as JSON.")
def demo(artifacts: Path, output: Path, trace: Path | None, report: Path | None) -> None:
    """Export, serve, stream the shipped speech and picture, and report."""
    from live_avatar.cli.demo import run_demo

    run_demo(artifacts, output, trace, report)
