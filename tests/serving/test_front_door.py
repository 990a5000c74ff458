"""Attacks that worked before there was a gateway, against real servers: each leaves the server and others unharmed."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving import metrics
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.supervisor import living_stages
from live_avatar_client import AvatarError, AvatarSession
from live_avatar_client.protocol import MAX_IMAGE_BYTES
from tests.cli.support import served, wait_until
from tests.serving.raw import BLOCK, NOTHING, raw_session
from tests.serving.support import bystander, command_of, scrape, scratch_of, series, spoken
from tests.support.certificates import CertificateFolder, shown_name

MIB = 2**20
SERVICE = "/inference.GRPCInferenceService/"
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def door(artifacts: Artifacts) -> Iterator[TritonServer]:
    options = ServerOptions(artifacts.folder, max_sessions=3, health_port=1).on_free_ports()
    with serving(options) as running:
        assert running.gateway.is_ready, "a client that comes at once is turned away"
        yield running


@pytest.fixture
def url(door: TritonServer) -> str:
    return door.options.url


@pytest.fixture(autouse=True)
def unharmed(door: TritonServer, url: str, picture: bytes, speech: Array, expected: Array) -> Iterator[None]:
    """The same Triton, gateway and stages before and after, and a session that is live meanwhile gets its frames."""
    before = (door.process.pid, door.gateway.process_id, living_stages(door.process.pid))
    with bystander(url, picture, speech, expected):
        yield
    assert door.is_running()
    assert (door.process.pid, door.gateway.process_id, living_stages(door.process.pid)) == before
    wait_until(lambda: scrape(door)[series(metrics.SESSIONS_LIVE)] == 0)


@contextmanager
def stub(url: str) -> Iterator[Any]:
    """The calls of KServe v2 on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(url, options=options) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(model: str = "live_avatar", **parameters: Any) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    return message


def with_audio(message: Any, samples: int = 0) -> Any:
    message.inputs.add(name="AUDIO", datatype="INT16", shape=[samples])
    message.raw_input_contents.append(bytes(2 * samples))
    return message


def memory_bytes(process: int) -> int:
    """Resident memory."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


def shared_bytes(door: TritonServer) -> int:
    """What the stages have in /dev/shm."""
    regions = [path for path in SHARED_MEMORY.glob("live-avatar-*") if path.name.startswith(prefix_of(door))]
    assert regions
    return sum(region.stat().st_blocks * 512 for region in regions)


def prefix_of(door: TritonServer) -> str:
    return command_of(door).split("shm-region-prefix-name=")[1].split("\0")[0]


# 1. Requests that ended Triton with a segmentation fault


def test_metadata_of_triton_reaches_nobody(url: str):
    for _ in range(8):
        with stub(url) as calls:
            message = with_audio(request(sequence_id=7))
            answers = calls.ModelStreamInfer(iter([message]), metadata=(("triton_grpc_error", "true"),), timeout=120.0)
            assert ["is not open on this stream" in answer.error_message for answer in answers] == [True]


def test_streams_that_are_closed_with_a_request_under_way(url: str):
    for model in ("live_avatar", "dit_step_1", "rolling_sink"):
        for _ in range(4):
            with stub(url) as calls:
                stream = calls.ModelStreamInfer(iter([request(model, sequence_id=7, sequence_start=True)]))
                stream.cancel()


def test_sessions_that_are_cancelled_at_every_moment(url: str):
    for pause_s in (0.0, 0.01, 0.05, 0.2, 0.5):
        with raw_session(url) as raw:
            raw.send(BLOCK, PORTRAIT.read_bytes(), b"cancelled", start=True)
            for _ in range(3):
                raw.send(BLOCK)
            time.sleep(pause_s)
            raw.vanish()


def test_a_message_that_is_none_leaves_the_other_sessions_of_its_stream(url: str, picture: bytes):
    """As a proxy's stream, which carries those of many."""
    first = with_audio(request(sequence_id=7, sequence_start=True), 7680)
    first.inputs.add(name="REFERENCE_IMAGE", datatype="UINT8", shape=[len(picture)])
    first.raw_input_contents.append(picture)
    block, end = (with_audio(request(sequence_id=7, sequence_end=last), 7680) for last in (False, True))
    rubbish = [b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"\xff"]
    messages = [first.SerializeToString(), *rubbish, block.SerializeToString(), end.SerializeToString()]
    with grpc.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stream = channel.stream_stream(f"{SERVICE}ModelStreamInfer")(iter(messages), timeout=60.0)
        answers = [service_pb2.ModelStreamInferResponse.FromString(answer) for answer in stream]
    errors = [answer.error_message for answer in answers if answer.error_message]
    assert errors == ["[INVALID_ARGUMENT] the message is no ModelInferRequest; send one of KServe v2."] * len(rubbish)
    assert len(answers) == len(messages)


# 3. and 4. Messages that take memory for ever


@pytest.mark.slow
def test_a_message_that_becomes_large_when_decompressed_is_refused(door: TritonServer, url: str):
    before = memory_bytes(door.gateway.process_id)
    with stub(url) as calls:
        for _ in range(3):
            message = with_audio(request(sequence_id=7), 100 * MIB)
            with pytest.raises(grpc.RpcError) as refused:
                list(calls.ModelStreamInfer(iter([message]), compression=grpc.Compression.Gzip, timeout=60.0))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert memory_bytes(door.gateway.process_id) - before < 3 * MAX_IMAGE_BYTES


@pytest.mark.parametrize("port", ["http_port", "metrics_port", "health_port"])
def test_a_body_to_an_http_port_is_not_kept(door: TritonServer, port: str):
    process = os.getpid() if port == "health_port" else door.gateway.process_id
    before = memory_bytes(process)
    connection = http.client.HTTPConnection("127.0.0.1", getattr(door.options, port), timeout=120.0)
    with suppress(OSError, http.client.HTTPException):  # it may close at once
        connection.putrequest("POST", "/v2/health/ready")
        connection.putheader("Content-Length", str(400 * MIB))
        connection.endheaders()
        piece = bytes(MIB)
        for _ in range(400):
            connection.send(piece)
        assert connection.getresponse().status in (404, 405, 413)
    connection.close()
    assert memory_bytes(process) - before < 200 * MIB


def test_refused_requests_leave_nothing_in_shared_memory(door: TritonServer, url: str, picture: bytes):
    before = shared_bytes(door)
    with raw_session(url) as raw:
        raw.ask(NOTHING, picture, start=True)
        assert "AUDIO has 10485760 samples" in raw.ask(np.zeros(10 * MIB, np.int16))
        assert "there is no parameter 'x'" in raw.ask(BLOCK, x="a" * 1000)
        assert "the request has more than 262144 bytes" in raw.ask(BLOCK, x="a" * (20 * MIB))
    with stub(url) as calls:
        for model in ("rolling_sink", "dit_step_1", "avatar_encoder"):
            with pytest.raises(grpc.RpcError) as refused:
                calls.ModelInfer(request(model, x="a" * (20 * MIB)), timeout=120.0)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert shared_bytes(door) - before < 10 * MIB


def slow_to_parse() -> Any:
    """30 million numbers one by one, which kept the gateway busy for 3 s."""
    message = request(sequence_id=7)
    message.inputs.add(name="REFERENCE_IMAGE", datatype="UINT8", shape=[30_000_000])
    message.inputs[0].contents.uint_contents.extend(bytes(30_000_000))
    return message


def test_a_message_that_is_slow_to_parse_is_refused(url: str):
    with stub(url) as calls:
        messages = iter([slow_to_parse(), with_audio(request(sequence_id=7))])
        answers = list(calls.ModelStreamInfer(messages, timeout=120.0))
    assert "send large inputs in raw_input_contents" in answers[0].error_message
    assert "is not open on this stream" in answers[1].error_message


@pytest.mark.slow  # a bar of time
def test_a_message_that_is_slow_to_parse_makes_nobody_wait(url: str):
    slowest_s, over = 0.0, threading.Event()

    def ask() -> None:
        nonlocal slowest_s
        with stub(url) as calls:
            while not over.wait(0.01):
                begun_s = time.monotonic()
                calls.ServerLive(service_pb2.ServerLiveRequest(), timeout=120.0)
                slowest_s = max(slowest_s, time.monotonic() - begun_s)

    asking = threading.Thread(target=ask)
    with stub(url) as calls:
        calls.ServerLive(service_pb2.ServerLiveRequest(), timeout=120.0)
        asking.start()
        list(calls.ModelStreamInfer(iter([slow_to_parse()]), timeout=120.0))
        over.set()
        asking.join()
    assert slowest_s < 2.0


# 5. A caller that reads nothing


def test_blocks_of_a_caller_that_reads_nothing_wait_with_the_caller(door: TritonServer, url: str, picture: bytes):
    sent = 0

    def messages() -> Iterator[Any]:
        nonlocal sent
        first = with_audio(request(sequence_id=7, sequence_start=True), 7680)
        first.inputs.add(name="REFERENCE_IMAGE", datatype="UINT8", shape=[len(picture)])
        first.raw_input_contents.append(picture)
        yield first
        for sent in range(1500):  # noqa: B007 - read by the test
            yield with_audio(request(sequence_id=7), 7680)

    with stub(url) as calls:
        stream = calls.ModelStreamInfer(messages())
        next(stream)
        before, deadline_s = -1, time.monotonic() + 300.0
        while before != sent and time.monotonic() < deadline_s:
            before = sent
            time.sleep(2.0)
        assert before == sent, "the gateway takes what it cannot pass on"
        assert sent < 1000
        assert scrape(door)[metrics.PIPE_BLOCKS.name] <= 10
        stream.cancel()


# 6. and 7. Triton's own calls, and its inner models


def test_triton_listens_where_only_the_gateway_is(door: TritonServer):
    inodes = set()
    for descriptor in Path(f"/proc/{door.process.pid}/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/{door.process.pid}/net/{table}").read_text().splitlines()[1:]]
        assert not [row[1] for row in rows if row[9] in inodes], "Triton has a TCP port"
    scratch = scratch_of(door)
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    assert "key" not in command_of(door)


def test_what_the_stages_share_is_readable_by_their_user_alone(door: TritonServer):
    regions = list(SHARED_MEMORY.glob(f"{prefix_of(door)}*"))
    assert regions
    assert {stat.S_IMODE(region.stat().st_mode) & 0o077 for region in regions} == {0}


def test_inner_models_do_not_exist_outside(url: str):
    for model in ("dit_step_1", "rolling_sink", "vae_decoder", "conditioning", "avatar_encoder"):
        assert_no_model(url, model)


def assert_no_model(url: str, model: str) -> None:
    with stub(url) as calls:
        [answer] = calls.ModelStreamInfer(iter([with_audio(request(model, sequence_id=7))]), timeout=120.0)
        assert f"there is no model '{model}'" in answer.error_message
        for call, message in (
            (calls.ModelInfer, request(model)),
            (calls.ModelMetadata, service_pb2.ModelMetadataRequest(name=model)),
            (calls.ModelConfig, service_pb2.ModelConfigRequest(name=model)),
            (calls.ModelStatistics, service_pb2.ModelStatisticsRequest(name=model)),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(message, timeout=120.0)
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert not calls.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=120.0).ready


# 8. What time tells


def test_an_avatar_of_another_caller_is_as_new_as_one_that_nobody_had(door: TritonServer, url: str, picture: bytes):
    def prepared() -> dict[str, float]:
        numbers = scrape(door)
        return {kind: numbers[series(metrics.AVATARS_PREPARED, kind)] for kind in ("known", "new")}

    def start(calls: int) -> dict[str, float]:
        """What so many sessions on one connection add. Each has one block, which the steps answer after the prefill."""
        before = prepared()
        with raw_session(url) as raw:
            for _ in range(calls):
                raw.ask(BLOCK, picture, b"a secret prompt", start=True)
                raw.ask(NOTHING, end=True)
            after = prepared()
        return {kind: after[kind] - before[kind] for kind in after}

    def misses() -> float:
        return scrape(door)[series(metrics.AVATAR_MISSES, "dit_step_1")]

    assert start(2) == {"known": 1.0, "new": 1.0}
    before = misses()
    assert start(1) == {"known": 0.0, "new": 1.0}
    assert misses() == before + 1, "a step has prefilled it for another"


# 13. Connections


@pytest.mark.slow
def test_idle_connections_do_not_keep_others_out(door: TritonServer, url: str, picture: bytes, speech: Array):
    """More than a process may have by default on many systems; those that say nothing are closed after a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8192:
        pytest.skip(f"needs 8192 open files, and this user may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ExitStack() as stack:
            idle = [
                stack.enter_context(socket.create_connection(("127.0.0.1", door.options.grpc_port)))
                for _ in range(1200)
            ]
            with AvatarSession(url, image=picture) as session:
                assert len(spoken(session, speech[:7680]).frames) == 12
            idle[0].settimeout(30.0)
            while idle[0].recv(4096):  # the server's settings, and then the end
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# 14. A client that is killed

CLIENT = """
import sys
from live_avatar_client import AvatarSession
with AvatarSession(sys.argv[1], image=sys.argv[2], idle=True) as session:
    for block in session:
        print(len(block.frames), flush=True)
"""


def test_the_place_of_a_killed_client_is_free_at_once(door: TritonServer, url: str):
    live = series(metrics.SESSIONS_LIVE)
    before = scrape(door)[live]
    command = [sys.executable, "-c", CLIENT, url, str(PORTRAIT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "12\n"
        assert scrape(door)[live] == before + 1
        client.kill()
    wait_until(lambda: scrape(door)[live] == before)
    assert scrape(door)[series(metrics.SESSIONS_ENDED, "disconnected")] >= 1


def test_a_session_belongs_to_its_stream(url: str, picture: bytes):
    with raw_session(url) as owner, raw_session(url, owner.session) as other:
        owner.ask(BLOCK, picture, start=True)
        for end in (False, True):
            assert "is not open on this stream" in other.ask(BLOCK, end=end)
        assert not isinstance(owner.ask(BLOCK), str)
        assert not isinstance(other.ask(BLOCK, picture, start=True), str)
        assert not isinstance(owner.ask(BLOCK), str)


# Servers of their own


@pytest.mark.slow
def test_nothing_is_imported_from_the_folder_where_serve_is_started(artifacts: Artifacts, tmp_path: Path):
    """Row 10: a module there was executed by the stages."""
    mark = tmp_path / "executed"
    here = tmp_path / "here"
    for name in ("asyncio.py", "json.py", "numpy.py", "live_avatar/__init__.py", "aiohttp.py"):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(mark)!r}, 'a').write({name!r})\n")
    # The command itself is imported from where it is installed, as the script `live-avatar` does.
    code = (
        "import os, sys; from pathlib import Path; from live_avatar.serving.server import serving;"
        "from live_avatar.serving.server_options import ServerOptions;"
        f"os.chdir({str(here)!r}); options = ServerOptions(Path({str(artifacts.folder)!r})).on_free_ports();"
        "server = serving(options); server.__enter__(); server.__exit__(None, None, None)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
    assert not mark.exists(), mark.read_text()


@pytest.mark.slow
def test_a_cleaner_of_temporary_files_does_no_lasting_harm(artifacts: Artifacts, picture: bytes, speech: Array):
    """Row 11: systemd-tmpfiles leaves a locked folder alone; after another cleaner a dead stage still comes back."""
    with serving(ServerOptions(artifacts.folder).on_free_ports()) as server:
        scratch = scratch_of(server)
        locked = subprocess.run(["flock", "--exclusive", "--nonblock", scratch, "true"], check=False)
        assert locked.returncode != 0
        subprocess.run(["find", *(scratch / name for name in ("control", "models", "backends")), "-delete"], check=True)
        with AvatarSession(server.options.url, image=picture) as session:
            assert len(spoken(session, speech[:7680]).frames) == 12
        os.kill(stage_of(server, "dit_step_3"), signal.SIGKILL)
        wait_until(lambda: not server.gateway.is_ready)
        wait_until(lambda: server.gateway.is_ready)
        with AvatarSession(server.options.url, image=picture) as session:
            assert len(spoken(session, speech[:7680]).frames) == 12


def stage_of(server: TritonServer, model: str) -> int:
    [found] = [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdecimal() and f"{scratch_of(server)}/models/{model}/1/model.py" in command_line(folder)
    ]
    return found


def command_line(process: Path) -> str:
    try:
        return process.joinpath("cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_the_gateway_comes_back_and_its_callers_are_told(artifacts: Artifacts, picture: bytes, speech: Array):
    with serving(ServerOptions(artifacts.folder, health_port=1).on_free_ports()) as server:
        with AvatarSession(server.options.url, image=picture) as session:
            spoken(session, speech[:7680])
            killed = server.gateway.process_id
            os.kill(killed, signal.SIGKILL)
            session.send(np.tile(speech[:7680], 4))
            with pytest.raises(AvatarError, match="open a new session"):
                list(session)
        wait_until(lambda: server.gateway.process_id != killed and server.gateway.is_ready)
        with AvatarSession(server.options.url, image=picture) as session:
            assert len(spoken(session, speech[:7680]).frames) == 12
        wait_until(lambda: scrape(server)[series(metrics.SESSIONS_LIVE)] == 0)


@pytest.mark.slow
def test_a_log_that_nobody_reads_stops_nothing(artifacts: Artifacts, tmp_path: Path, picture: bytes, speech: Array):
    """Row 12: sessions froze when the pipe of stderr was full, and SIGTERM hung."""
    with served(tmp_path / "served", artifacts) as (running, options):
        with raw_session(options.url) as raw:
            for _ in range(2500):  # a line each: more than a pipe and the queue hold
                raw.ask(NOTHING, start=True)
        with AvatarSession(options.url, image=picture) as session:
            assert len(spoken(session, speech[:7680]).frames) == 12
        assert running.end_unread(signal.SIGTERM) == 0


@pytest.mark.slow
def test_a_new_certificate_needs_no_restart(artifacts: Artifacts, tmp_path: Path):
    folder = CertificateFolder(tmp_path)
    with serving(ServerOptions(artifacts.folder, access=folder.access).on_free_ports()) as server:
        assert shown_name(folder, server.options.grpc_port) == "first"
        folder.issue("second")
        wait_until(lambda: shown_name(folder, server.options.grpc_port) == "second")


@pytest.mark.slow
def test_each_line_of_a_json_log_is_an_object(artifacts: Artifacts, tmp_path: Path, picture: bytes, speech: Array):
    """Of the gateway, the supervisor, the stages and Triton."""
    with served(tmp_path / "served", artifacts, "--log-format", "json", "--verbose") as (running, options):
        with AvatarSession(options.url, image=picture) as session:
            spoken(session, speech[:7680])
        with raw_session(options.url) as raw:
            raw.ask(NOTHING, start=True)
        code, said = running.end(signal.SIGTERM)
    assert code == 0
    lines = [json.loads(line) for line in said.splitlines()]
    assert all(isinstance(line["time"], str) for line in lines)
    events = [line["event"] for line in lines if "event" in line]
    assert events == ["session started", "session ended", "session refused"]
    assert any("Started GRPCInferenceService" in line.get("message", "") for line in lines)


@pytest.mark.slow
def test_streams_without_a_session_end_and_are_bounded(artifacts: Artifacts, picture: bytes, speech: Array):
    """Each may be reading a large message, so they must not pile up."""
    options = ServerOptions(artifacts.folder, max_sessions=1, idle_seconds=10.0).on_free_ports()
    most, over = 66, threading.Event()
    with serving(options) as server, ExitStack() as stack:
        stack.callback(over.set)
        channels = [stack.enter_context(stub(options.url)) for _ in range(2)]
        streams = [channels[n % 2].ModelStreamInfer(iter(over.wait, True)) for n in range(most + 4)]
        wait_until(lambda: sum(stream.done() for stream in streams) == 4)
        refused = {stream.details() for stream in streams if stream.done()}
        assert refused == {f"all {most} streams of this server are open; try again later or elsewhere."}
        assert scrape(server)[metrics.STREAMS.name] == most
        wait_until(lambda: scrape(server)[metrics.STREAMS.name] == 0)
        with AvatarSession(options.url, image=picture) as session:
            assert len(spoken(session, speech[:7680]).frames) == 12
