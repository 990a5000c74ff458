"""The commands of the page: `web` serves it, `talk` starts everything for it, and `say` speaks a text into a video."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from live_avatar import interrupts
from live_avatar.cli.marks import credentials_of, signing_options
from live_avatar.cli.options import (
    FILE,
    Integer,
    combined,
    connection_arguments,
    connection_options,
    image_options,
    listening_address,
)
from live_avatar.cli.terminal import say

if TYPE_CHECKING:
    from live_avatar_client.web.options import WebOptions

MAX_TALKERS = 2  # with a moving picture each, on two cores

port_option = click.option(
    "--port", type=Integer(1, 65535), default=8080, show_default=True, help="Port of the page, on --host."
)
voice_option = click.option(
    "--voice",
    default="en-us",
    show_default=True,
    help="espeak-ng's voice of typed text: a language, perhaps with a variant, such as en-us+f2.",
)
speech_endpoint_options = combined(
    click.option("--speech-key-file", type=FILE, help="File with the API key of --speech-url."),
    click.option("--speech-voice", default="alloy", show_default=True, help="Voice of --speech-url."),
    click.option("--speech-model", default="tts-1", show_default=True, help="Model of --speech-url."),
    click.option(
        "--speech-url",
        help="Speak typed text with this endpoint instead of espeak-ng: the address of an OpenAI-compatible "
        "/v1/audio/speech.",
    ),
)


@click.command()
@click.option("--url", default="localhost:8001", show_default=True, help="host:port of the server's gRPC port.")
@click.option(
    "--host", callback=listening_address, default="127.0.0.1", show_default=True, help="Address to listen on."
)
@port_option
@click.option("--certificate", type=FILE, help="The page's own certificate (PEM); needed beyond this machine.")
@click.option("--certificate-key", type=FILE, help="Private key of --certificate (PEM).")
@click.option("--visitor-key-file", type=FILE, help="File with the key of visitors; needed beyond this machine.")
@click.option(
    "--origin",
    "origins",
    multiple=True,
    help="Address of a proxy in front of the page, such as https://avatar.example; may be given several times.",
)
@click.option(
    "--portrait",
    "portraits",
    type=FILE,
    multiple=True,
    help="Picture to choose from, named after its file; may be given several times. Default: drawn faces.",
)
@click.option(
    "--sessions-per-address",
    type=Integer(min=1),
    default=4,
    show_default=True,
    help="Conversations that one address may have open.",
)
@voice_option
@speech_endpoint_options
@signing_options("recordings with a C2PA manifest")
@connection_options
def web(
    url: str,
    visitor_key_file: Path | None,
    portraits: tuple[Path, ...],
    speech_url: str | None,
    speech_model: str,
    speech_voice: str,
    speech_key_file: Path | None,
    api_key_file: Path | None,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    sign_certificate: Path | None,
    sign_key: Path | None,
    **options: Any,
) -> None:
    """Serve a page to talk to the avatar of a server, until Ctrl-C (docs/web.md)."""
    from live_avatar.assets import PORTRAITS
    from live_avatar.serving.access import read_key
    from live_avatar_client.image import read_image_bytes
    from live_avatar_client.web.options import TextToSpeech, WebOptions

    for portrait in portraits:
        read_image_bytes(portrait)
    faces = {portrait.stem: portrait for portrait in portraits}
    if len(faces) < len(portraits):
        raise click.UsageError(
            f"{len(portraits)} portraits have {len(faces)} names ({', '.join(faces)}); name each file differently"
        )
    if odd := [name for name in faces if set(name) & set("{}/?#%")]:
        raise click.UsageError(f"the portrait {odd[0]!r} cannot be part of an address; name the file without {{}}?#%")
    if speech_url is None and speech_key_file is not None:
        raise click.UsageError("--speech-key-file is for --speech-url; give both, or none")
    endpoint = None
    if speech_url is not None:
        key = None if speech_key_file is None else read_key(speech_key_file)
        endpoint = TextToSpeech(speech_url, speech_model, speech_voice, key)
    run_page(
        WebOptions(
            url,
            **connection_arguments(api_key_file, tls_ca, tls_certificate, tls_key),
            visitor_key=None if visitor_key_file is None else read_key(visitor_key_file),
            portraits=faces or PORTRAITS,
            text_to_speech=endpoint,
            credentials=credentials_of(sign_certificate, sign_key),
            **options,
        )
    )


@click.command()
@click.option(
    "--artifacts", type=FILE, default="artifacts/tiny", show_default=True, help="Exported if they are missing."
)
@port_option
@voice_option
def talk(artifacts: Path, port: int, voice: str) -> None:
    """Export, serve and show the bundled avatar on a page of this machine, until Ctrl-C."""
    from live_avatar.assets import PORTRAITS
    from live_avatar.cli.demo import ready_artifacts
    from live_avatar.cli.places import require_places
    from live_avatar.errors import ServerError
    from live_avatar.serving.server import serving
    from live_avatar.serving.server_options import ServerOptions
    from live_avatar_client.web.options import WebOptions

    require_places(artifacts=artifacts)
    ready_artifacts(artifacts)
    chosen = ServerOptions(artifacts, max_sessions=MAX_TALKERS, share_avatars=True).on_free_ports()
    say(f"Starting Triton (profile {chosen.profile}).")
    with serving(chosen) as server:
        run_page(
            WebOptions(server.options.url, port=port, voice=voice, portraits=PORTRAITS), lambda: not server.is_running()
        )
        if not server.is_running():
            raise ServerError(f"Triton ended by itself with code {server.process.returncode}:\n{server.errors()}")


@click.command("say")
@click.argument("text")
@click.option("--url", default="localhost:8001", show_default=True, help="host:port of the server's gRPC port.")
@click.option("--label", default="AI-generated", show_default=True, help="Text drawn on every frame; '' for none.")
@voice_option
@connection_options
@image_options
def say_text(
    text: str,
    url: str,
    label: str,
    voice: str,
    image: Path,
    prompt: str,
    seed: int,
    output: Path,
    frames_output: Path | None,
    **connection: Path | None,
) -> None:
    """Let the avatar of a server say TEXT, and write the video."""
    from live_avatar.cli.demo import frame_bar, session_video, stream_to_file
    from live_avatar_client.espeak import Voice, speak
    from live_avatar_client.media import read_image_bytes
    from live_avatar_client.sync import AvatarSession

    speech, picture = speak(text, Voice(voice)).speech, read_image_bytes(image)
    session = AvatarSession(
        url, image=picture, prompt=prompt, seed=seed, label=label, **connection_arguments(**connection)
    )
    with session_video(session, output, speech, frames_output) as video, frame_bar("video", video) as bar:
        stats = stream_to_file(session, speech, False, video, bar.update)
    say(f"Wrote {output} ({stats.frames} frames).")


def run_page(options: WebOptions, over: Callable[[], bool] = lambda: False) -> None:
    """Serves the page until a signal comes, or until `over()`."""
    from live_avatar_client.web.server import serve

    def ready(address: str) -> None:
        say(f"Talk to the avatar at {address} (press Ctrl-C to stop).")

    with interrupts.deferred():
        asyncio.run(serve(options, ready, lambda: interrupts.received() or over()))
    say("Stopped.")
