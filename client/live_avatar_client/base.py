"""What the sync and the asyncio session share: their options, and how messages reach the core.

Knows the core and the messages, and that a transport has a lock, a queue of messages to write and a way
to wake up who waits. It opens no connection and never waits.
"""

import contextlib
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final, SupportsIndex, cast

import grpc

from . import wire
from .core import Limits, Opening, SessionCore
from .errors import AvatarError, ConnectFailed, InvalidInput, ServerIncompatible, SessionClosed
from .image import image_bytes
from .protocol import MAX_PROMPT_CHARS, MAX_SEED, FrameFormat

CHANNEL_OPTIONS: Final = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
_LOOPBACK: Final = re.compile(r"localhost|127\.[\d.]+|\[::1\]")

CLOSE_GRACE_S: Final = 1.0
"""How long a closing session waits for the server to take note of the end before it cancels the stream."""


class BaseSession(ABC):
    """One avatar speaking one speech."""

    _lock: contextlib.AbstractContextManager[object]

    def __init__(
        self,
        url: str,
        *,
        image: bytes | str | os.PathLike[str],
        prompt: str = "",
        seed: int = 0,
        frame_format: FrameFormat | str = FrameFormat.RAW,
        max_in_flight_blocks: int = 8,
        max_unread_blocks: int = 64,
        connect_timeout_s: float = 10.0,
        send_timeout_s: float = 30.0,
        answer_timeout_s: float = 60.0,
    ) -> None:
        """Check the options; entering the session connects it.

        Args:
            url: `host:port` of the server's gRPC port, with or without `grpc://` in front.
            image: the reference image: the bytes of a PNG, JPEG or WebP file, or its path.
            prompt: describes the scene and the manner of the person, at most 2,000 characters.
            seed: the same seed, image, prompt and speech give the same video.
            frame_format: "raw" gives RGB pixels (`Block.frames`), "jpeg" encoded frames (`Block.jpegs`),
                which need far less of the network.
            max_in_flight_blocks: how many blocks (0.48 s each) may be sent but unanswered.
            max_unread_blocks: how many blocks may be answered but unread; `send` waits beyond. The default
                holds 30 s of video, at 720 x 400 pixels up to 664 MB in raw format.
            connect_timeout_s: how long entering the session may take.
            send_timeout_s: how long `send` waits while not one block can be sent.
            answer_timeout_s: how long the server may leave a block without an answer.
        """
        self.url = url
        self._address = parse_url(url)
        opening = Opening(
            image_bytes(image), _checked_prompt(prompt), _checked_seed(seed), _checked_format(frame_format)
        )
        _require_positive(
            max_in_flight_blocks=max_in_flight_blocks,
            max_unread_blocks=max_unread_blocks,
            connect_timeout_s=connect_timeout_s,
            send_timeout_s=send_timeout_s,
            answer_timeout_s=answer_timeout_s,
        )
        self._connect_timeout_s = connect_timeout_s
        limits = Limits(max_in_flight_blocks, max_unread_blocks, send_timeout_s, answer_timeout_s)
        self._core = SessionCore(opening, limits)
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Make the transport's lock and queue, which need no connection."""

    @abstractmethod
    def _write(self, message: wire.Message | None) -> None:
        """Queue a message for the server; None is the last."""

    @abstractmethod
    def _notify(self) -> None:
        """Wake up everyone who waits for the session to change."""

    @contextlib.contextmanager
    def _update(self) -> Iterator[SessionCore]:
        """Lend the core for a change, then send what the change allows to send."""
        with self._lock:
            try:
                yield self._core
            finally:
                self._flush()
                self._notify()

    def _flush(self) -> bool:
        """Send every request that may go now; return whether there was one."""
        sent = False
        while request := self._core.next_request():
            self._write(wire.encode_request(request))
            if request.end:
                self._write(None)
            sent = True
        return sent

    def _receive(self, message: wire.Message) -> None:
        with self._update() as core:
            if message.error_message:
                core.receive_error(message.error_message)
                return
            try:
                core.receive(wire.decode_response(message.infer_response))
            except ServerIncompatible as error:
                core.fail(error)

    def _receive_close(self, error: grpc.RpcError | None) -> None:
        with self._update() as core:
            core.receive_close("the server closed it" if error is None else _status(error)[1])

    def _begin_close(self) -> None:
        with self._update() as core:
            core.fail(SessionClosed("the session was closed before the last frame; open a new session"))
        self._write(None)

    def _connect_error(self, error: grpc.RpcError) -> AvatarError:
        code, details = _status(error)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return ServerIncompatible(
                f"the server at {self.url} speaks gRPC but not KServe v2; pass the address of a Live Avatar server"
            )
        return ConnectFailed(
            f"no server answered at {self.url} within {self._connect_timeout_s:g} s: {details}; check that "
            "it runs and that this is its gRPC port (8001 unless told otherwise)"
        )


def parse_url(url: str) -> str:
    """Return the `host:port` of an address, which may have `grpc://` in front."""
    scheme, separator, address = url.rpartition("://")
    host, _, port = address.rpartition(":")
    if separator and scheme != "grpc":
        raise InvalidInput(
            f"the address {url!r} has the scheme {scheme!r}, but frames are streamed over gRPC; pass "
            "host:port of the server's gRPC port (8001 unless told otherwise)"
        )
    if not host or "/" in address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidInput(f"the address {url!r} is not host:port; pass one such as 'localhost:8001'")
    return address


def channel_options(address: str) -> tuple[tuple[str, int], ...]:
    """Return the options of the channel to `host:port`: to this machine, no proxy of the environment is used."""
    host = address.rpartition(":")[0]
    return (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(not _LOOPBACK.fullmatch(host))))


def _status(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Return the status of a failed call and its words."""
    call = cast(grpc.Call, error)
    return call.code(), call.details() or call.code().name


def _checked_prompt(prompt: str) -> str:
    if not isinstance(prompt, str):
        raise InvalidInput(f"prompt is a {type(prompt).__name__}; pass a str")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise InvalidInput(f"prompt has {len(prompt)} characters; pass at most {MAX_PROMPT_CHARS}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"prompt cannot be written as UTF-8: {error.reason} at {error.start}") from error
    return prompt


def _checked_seed(seed: SupportsIndex) -> int:
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise InvalidInput(f"seed is a {type(seed).__name__}; pass an int") from error
    if not 0 <= number <= MAX_SEED:
        raise InvalidInput(f"seed is {number}; pass an int from 0 to 2**63 - 1")
    return number


def _checked_format(frame_format: FrameFormat | str) -> FrameFormat:
    try:
        return FrameFormat(frame_format)
    except ValueError as error:
        raise InvalidInput(f"frame_format is {frame_format!r}; pass 'raw' or 'jpeg'") from error


def _require_positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise InvalidInput(f"{name} is {value}; pass a number above 0")
