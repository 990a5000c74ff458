"""The demo, and the pieces of it that the command line has as commands of their own.

Exports if need be, serves, streams the shipped speech and picture twice (as spoken, then as fast as it goes), and
reports.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from live_avatar import interrupts
from live_avatar.arrays import Array
from live_avatar.assets import DEMO_PROMPT, PORTRAIT, SPEECH
from live_avatar.cli.places import require_places
from live_avatar.cli.terminal import say
from live_avatar.config import SAMPLE_RATE_HZ, TINY
from live_avatar.environment import environment
from live_avatar.errors import ArtifactError
from live_avatar.graphs.artifacts import MANIFEST, Artifacts, load_artifacts
from live_avatar.graphs.contract import contracts
from live_avatar.json_files import read_json
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.trace import chrome_trace, overlapped_share, read_trace
from live_avatar_client import AvatarSession, Block, StreamStats
from live_avatar_client.files import OutputFile
from live_avatar_client.media import provenance_metadata, read_speech
from live_avatar_client.protocol import BLOCK_SAMPLES
from live_avatar_client.video import SpeechVideo

if TYPE_CHECKING:
    from live_avatar.exporter.quantization import Scaling
    from live_avatar.weights.tensors import Checkpoint
    from live_avatar_client.credentials import ContentCredentials

CHUNK_S = 0.02
SEED = 0


def export_with_progress(opened: Callable[[], Checkpoint], output: Path, scaling: Scaling | None = None) -> Artifacts:
    """`export_artifacts` behind a progress bar. A second process starts while this one opens the checkpoint."""
    from live_avatar.exporter.processes import can_have_helper, helper_process

    with helper_process() if can_have_helper() else nullcontext() as helper:
        from live_avatar.exporter.build import export_artifacts

        checkpoint = opened()
        total = len(contracts(checkpoint.preset))
        with tqdm(total=total, unit="graph", desc="export", leave=False, disable=None) as bar:

            def progress(component: str) -> None:
                bar.set_postfix_str(component)
                bar.update()

            return export_artifacts(checkpoint, output, progress, scaling, helper)


def spoken(speech: Array) -> Iterator[Array]:
    """Chunks of 20 ms, each when it would have been spoken."""
    size = round(CHUNK_S * SAMPLE_RATE_HZ)
    started_s = time.monotonic()
    for start in range(0, speech.shape[-1], size):
        chunk = speech[..., start : start + size]
        time.sleep(max(0.0, started_s + (start + chunk.shape[-1]) / SAMPLE_RATE_HZ - time.monotonic()))
        yield chunk


def stream_to_file(
    session: AvatarSession,
    speech: Array,
    realtime: bool,
    video: SpeechVideo | None,
    progress: Callable[[int], object],
) -> StreamStats:
    """Streams a speech, int16 [samples] or [speakers, samples], over a session that is not open yet, and writes what
    comes back, with its provenance.

    `progress` is told the frames of each block.
    """

    def written(blocks: Iterator[Block]) -> Iterator[Block]:
        for block in blocks:
            if video is not None:
                video.write(block.frames)
            progress(len(block))
            interrupts.check()
            yield block

    chunks = spoken(speech) if realtime else [speech]
    sent = chunks if speech.ndim == 1 else (dict(enumerate(chunk)) for chunk in chunks)
    with session:
        return StreamStats.from_blocks(written(session.stream(sent)))


def session_video(
    session: AvatarSession,
    output: Path,
    speech: Array,
    frames_output: Path | None = None,
    credentials: ContentCredentials | None = None,
) -> SpeechVideo:
    """The video of a session's speech; it will say what made it, as soon as the server has told."""
    return SpeechVideo(
        output,
        speech,
        frames_output,
        metadata=lambda: provenance_metadata(session.provenance or {}),
        credentials=credentials,
    )


def run_demo(artifacts: Path, output: Path, trace: Path | None, report: Path | None) -> None:
    """The whole way, from nothing to a video; prints what was measured, and writes it to `report`."""
    require_places(artifacts=artifacts, trace=trace)
    speech, image = read_speech(SPEECH), PORTRAIT.read_bytes()
    named = {"video": output, "trace": trace, "report": report}
    files = {kind: OutputFile(path, kind) for kind, path in named.items() if path is not None}
    for file in files.values():
        _ready_place(file)
    ready_artifacts(artifacts)
    with tempfile.TemporaryDirectory(prefix="live-avatar-trace-") as intervals:
        options = replace(
            ServerOptions(artifacts, share_avatars=True).on_free_ports(), trace=Path(intervals) if trace else None
        )
        say(f"Starting Triton (profile {options.profile}).")
        with serving(options) as server:
            session = partial(AvatarSession, server.options.url, image=image, seed=SEED)
            first = session(prompt=DEMO_PROMPT)
            with session_video(first, output, speech) as video, frame_bar("as spoken", video) as bar:
                live = stream_to_file(first, speech, True, video, bar.update)
            new, known = (
                stream_to_file(session(prompt=""), speech[:BLOCK_SAMPLES], False, None, bar.update) for _ in range(2)
            )
            with frame_bar("as fast as it goes", video) as bar:
                fast = stream_to_file(session(prompt=DEMO_PROMPT), speech, False, None, bar.update)
        if "trace" in files:
            _write_trace(Path(intervals), files["trace"])
    if "report" in files:
        figures = {"as_spoken": live, "new_avatar": new, "known_avatar": known, "as_fast_as_it_goes": fast}
        _write_json(files["report"], _figures(load_artifacts(artifacts), figures))
    say(
        f"FPS                     {fast.fps:6.1f}    frames per second, speech sent as fast as it is taken\n"
        f"TTFF                    {live.ttff_s:6.2f} s  first sample spoken to first frame, a new avatar: "
        f"{live.ttff_block_wait_s:.2f} s until the block is full, {live.ttff_server_s:.2f} s to serve it\n"
        f"TTFF, speech at hand    {new.ttff_server_s:6.2f} s  to serve the first block of a new avatar\n"
        f"TTFF, known avatar      {known.ttff_server_s:6.2f} s  the same, with its encoding and prefill remembered\n"
        f"Audio-to-frame latency  {live.latency_p50_s:6.2f} s  median, speech sent as it is spoken "
        f"(95 %: {live.latency_p95_s:.2f} s)\n"
        f"Video                   {output} ({live.frames} frames)"
    )


def _held_preset(folder: Path) -> str | None:
    """Name of the preset whose artifacts, of any version, are in `folder`."""
    try:
        return str(read_json(folder / MANIFEST)["preset"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ready_place(file: OutputFile) -> None:
    """Makes the folder of an output file, and finds out now whether the file can be written."""
    with file.explained():
        file.target.parent.mkdir(parents=True, exist_ok=True)
    file.check()


def ready_artifacts(folder: Path) -> None:
    """Exports TINY to `folder` unless it is there; never over artifacts of another preset."""
    with suppress(ArtifactError):
        if load_artifacts(folder).preset == TINY:
            return
    if (held := _held_preset(folder)) not in (None, TINY.name):
        raise ArtifactError(
            f"{folder} holds preset {held!r}, and this command needs {TINY.name!r}; give other --artifacts."
        )
    say(f"Exporting preset {TINY.name} to {folder} (about a minute).")
    export_with_progress(_open_tiny, folder)


def _open_tiny() -> Checkpoint:
    from live_avatar.weights.checkpoint import open_checkpoint

    return open_checkpoint(TINY)


def frame_bar(description: str, video: SpeechVideo) -> Any:
    """A progress bar over the frames of a video; silent where stderr is no terminal."""
    return tqdm(total=video.expected_frames, unit="frame", desc=description, leave=False, disable=None)


def _write_trace(intervals: Path, trace: OutputFile) -> None:
    read = read_trace(intervals)
    _write_json(trace, chrome_trace(read))
    fast = [interval for interval in read if interval.session == read[-1].session]
    share = overlapped_share(fast)
    say(f"Trace: {trace.path} (as fast as it goes, {share:.0%} of the time had stages at work on different blocks)")


def _write_json(file: OutputFile, document: object) -> None:
    try:
        file.create()
        with file.explained():
            file.partial.write_text(json.dumps(document, indent=1))
        file.publish()
    finally:
        file.discard()


def _figures(artifacts: Artifacts, measured: dict[str, StreamStats]) -> dict[str, object]:
    """What was measured, on what, and by which command."""
    return {
        "command": "live-avatar demo --report FILE",
        "environment": environment(),
        "artifacts": {"preset": artifacts.preset.name, "fingerprint": artifacts.fingerprint},
        **{name: asdict(stats) for name, stats in measured.items()},
    }
