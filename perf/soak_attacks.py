"""Attackers among the callers of the soak: what is known to have hurt a server, again and again, at a bounded rate.

They have a key of their own. An attack ends when it has been answered, or after a bound; `Breach` means that it worked.
"""

from __future__ import annotations

import http.client
import io
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, cast

import grpc
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.base import call_metadata
from live_avatar_client.protocol import BLOCK_SAMPLES, MODEL_NAME
from perf.soak_sessions import pictures

MIB: Final = 2**20
CALL_S: Final = 30.0
HELD_S: Final = 3.0
"""How long connections and streams that do nothing are held."""
IDLE_CONNECTIONS: Final = 200
CHURN: Final = 20
INNER_MODELS: Final = ("conditioning", "dit_step_1", "rolling_sink", "vae_decoder", "avatar_encoder")
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)

Metadata = tuple[tuple[str, str], ...]


class Breach(Exception):  # noqa: N818 - it is a finding of the soak
    """The server did what it must refuse."""


@dataclass
class Attacker:
    """One attacker: where it attacks, its key, and what it has done so far, by attack."""

    options: ServerOptions
    api_key: str
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)
    breaches: list[str] = field(default_factory=list)

    def attack(self) -> None:
        """One attack, drawn at random."""
        chosen = self.rng.choice(ATTACKS)
        try:
            chosen(self)
        except Breach as breach:
            self.breaches.append(f"{chosen.__name__}: {breach}")
        except (grpc.RpcError, OSError, http.client.HTTPException):
            pass  # refused, or a stage was killed meanwhile
        self.done[chosen.__name__.replace("_", " ")] += 1

    @contextmanager
    def calls(self) -> Iterator[Any]:
        """The calls of KServe v2 on a connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(self.options.url, options=options) as channel:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)

    @property
    def metadata(self) -> Metadata:
        return call_metadata(self.api_key) or ()

    def stream(self, calls: Any, messages: Any, metadata: Metadata = (), **options: Any) -> Any:
        return calls.ModelStreamInfer(messages, timeout=CALL_S, metadata=(*self.metadata, *metadata), **options)

    def expect_refused(self, answers: Any) -> None:
        for answer in answers:
            if not answer.error_message:
                raise Breach("it was answered")


def request(model: str = MODEL_NAME, samples: int = 0, picture: bytes | None = None, **flags: bool) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model)
    message.parameters["sequence_id"].int64_param = 7
    for name, value in flags.items():
        message.parameters[f"sequence_{name}"].bool_param = value
    message.inputs.add(name="AUDIO", datatype="INT16", shape=[samples])
    message.raw_input_contents.append(bytes(2 * samples))
    if picture is not None:
        message.inputs.add(name="REFERENCE_IMAGE", datatype="UINT8", shape=[len(picture)])
        message.raw_input_contents.append(picture)
    return message


def metadata_of_triton(attacker: Attacker) -> None:
    """Ended Triton 2.51 with a fault."""
    for _ in range(4):
        with attacker.calls() as calls:
            attacker.expect_refused(
                attacker.stream(calls, iter([request()]), metadata=(("triton_grpc_error", "true"),))
            )


def inner_models(attacker: Attacker) -> None:
    model = attacker.rng.choice(INNER_MODELS)
    with attacker.calls() as calls:
        attacker.expect_refused(attacker.stream(calls, iter([request(model)])))
        attacker.stream(calls, iter([request(model, start=True)])).cancel()
        with suppress(grpc.RpcError):
            calls.ModelInfer(request(model), timeout=CALL_S, metadata=attacker.metadata)
            raise Breach(f"{model} has answered")


def operators_calls(attacker: Attacker) -> None:
    with attacker.calls() as calls:
        for call, message in (
            (calls.RepositoryModelUnload, service_pb2.RepositoryModelUnloadRequest(model_name=MODEL_NAME)),
            (
                calls.SystemSharedMemoryRegister,
                service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1),
            ),
        ):
            with suppress(grpc.RpcError):
                call(message, timeout=CALL_S, metadata=attacker.metadata)
                raise Breach("it was obeyed")


def without_a_key(attacker: Attacker) -> None:
    with attacker.calls() as calls:
        for metadata in ((), call_metadata("a-key-that-nobody-has") or ()):
            with suppress(grpc.RpcError):
                for _ in calls.ModelStreamInfer(iter([request(start=True)]), timeout=CALL_S, metadata=metadata):
                    raise Breach("it was answered")


def compressed(attacker: Attacker) -> None:
    """Small on the way, large in memory."""
    with attacker.calls() as calls, suppress(grpc.RpcError):
        attacker.expect_refused(
            attacker.stream(calls, iter([request(samples=20 * MIB)]), compression=grpc.Compression.Gzip)
        )


def large_parameter(attacker: Attacker) -> None:
    message = request(start=True)
    message.parameters["x"].string_param = "x" * (20 * MIB)
    with attacker.calls() as calls:
        attacker.expect_refused(attacker.stream(calls, iter([message])))


def rubbish(attacker: Attacker) -> None:
    """As messages, and as HTTP/2."""
    with cast(Any, grpc.insecure_channel(attacker.options.url)) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        messages = [attacker.rng.randbytes(attacker.rng.randint(0, 3000)) for _ in range(20)]
        for _ in call(iter(messages), timeout=CALL_S, metadata=attacker.metadata):
            pass
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", attacker.options.grpc_port), timeout=CALL_S) as connection:
            connection.sendall(PREFACE + attacker.rng.randbytes(500))


def bad_picture(attacker: Attacker) -> None:
    picture = attacker.rng.choice(BAD_PICTURES)
    with attacker.calls() as calls:
        attacker.expect_refused(attacker.stream(calls, iter([request(picture=picture, start=True)])))


def reads_nothing(attacker: Attacker) -> None:
    blocks = [request(samples=BLOCK_SAMPLES) for _ in range(60)]
    with attacker.calls() as calls:
        stream = attacker.stream(calls, iter([request(picture=PICTURE, start=True), *blocks]))
        time.sleep(HELD_S)
        stream.cancel()


def vanishes(attacker: Attacker) -> None:
    """The connection breaks with blocks under way."""
    with attacker.calls() as calls:
        stream = attacker.stream(
            calls, iter([request(picture=PICTURE, start=True), *[request(samples=BLOCK_SAMPLES)] * 6])
        )
        next(stream)


def churn(attacker: Attacker) -> None:
    """Sessions that are opened and closed at once."""
    pair = [request(picture=PICTURE, start=True), request(end=True)]
    with attacker.calls() as calls:
        for _ in attacker.stream(calls, iter(pair * CHURN)):
            pass


def idle_connections(attacker: Attacker) -> None:
    with ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", attacker.options.grpc_port), timeout=CALL_S))
        time.sleep(HELD_S)


def streams_without_a_session(attacker: Attacker) -> None:
    with attacker.calls() as calls:
        streams = [attacker.stream(calls, _nothing(HELD_S)) for _ in range(20)]
        time.sleep(HELD_S)
        for stream in streams:
            stream.cancel()


def _nothing(seconds: float) -> Iterator[Any]:
    time.sleep(seconds)
    yield from ()


def large_bodies(attacker: Attacker) -> None:
    for port in (attacker.options.http_port, attacker.options.metrics_port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_S)
        with suppress(OSError, http.client.HTTPException):
            connection.request("POST", "/v2/health/ready", body=bytes(20 * MIB))
            connection.getresponse()
        connection.close()


def _bad_pictures() -> list[bytes]:
    """Large when decoded, slow to decode, cut off, and none at all."""
    whole = _encoded("JPEG", 64)
    return [
        _encoded("PNG", 9000),
        _progressive(2000, 120),
        whole[: len(whole) // 2],
        b"",
        bytes(1000),
        b"RIFF\0\0\0\0WEBPVP8L",
    ]


def _encoded(kind: str, side: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, kind, **options)
    return buffer.getvalue()


def _progressive(side: int, scans: int) -> bytes:
    """A JPEG whose last scan is there many times."""
    data = _encoded("JPEG", side, progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


PICTURE: Final = pictures(1)[0]
BAD_PICTURES: Final = _bad_pictures()
ATTACKS: Final[tuple[Callable[[Attacker], None], ...]] = (
    metadata_of_triton,
    inner_models,
    operators_calls,
    without_a_key,
    compressed,
    large_parameter,
    rubbish,
    bad_picture,
    bad_picture,
    reads_nothing,
    vanishes,
    churn,
    idle_connections,
    streams_without_a_session,
    large_bodies,
)
