"""Shared base of the blocking and the asyncio session: options, channel, and the exchange of messages with the core.

Nothing here waits; the transports do.
"""

import contextlib
import operator
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Final, SupportsIndex, cast

import grpc
import grpc.aio
import numpy as np

from . import wire
from .address import is_loopback, parse_url
from .core import Limits, SessionCore
from .errors import (
    AvatarError,
    AvatarWarning,
    ConnectFailed,
    InvalidInput,
    ServerIncompatible,
    SessionClosed,
    SessionRefused,
)
from .image import image_bytes
from .messages import Opening
from .protocol import (
    API_KEY_HEADER,
    DEFAULT_JPEG_QUALITY,
    FRAMES_PER_BLOCK,
    FRAMES_PER_RESPONSE,
    MAX_ANSWER_BYTES,
    MAX_IMAGE_BYTES,
    MAX_JPEG_QUALITY,
    MAX_LABEL_CHARS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MIN_JPEG_QUALITY,
    FrameFormat,
)
from .speakers import Speaker, mask_bytes
from .text import printable
from .tls import TLS

CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
)
_RESTRICTED: Final = "This protocol is restricted"
_TLS_FAULTS: Final = (
    "handshake",
    "Verification",
    "SSL_ERROR",
    "CERTIFICATE",
    "Socket closed",
    "End of TCP stream",
    "reset by peer",
)

LONGEST_WAIT_S: Final = 3600.0
"""Longest single wait: locks and event loops take no infinite timeout, so longer waits are repeated."""

CLOSE_GRACE_S: Final = 1.0
"""How long a closing session waits for the server's answer to END before it cancels the stream."""


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
        jpeg_quality: int = DEFAULT_JPEG_QUALITY,
        label: str = "",
        frames_per_response: int = FRAMES_PER_BLOCK,
        idle: bool = False,
        speakers: Sequence[Speaker] = (),
        api_key: str | None = None,
        tls: TLS | None = None,
        max_in_flight_blocks: int = 8,
        max_unread_blocks: int = 64,
        connect_timeout_s: float = 10.0,
        send_timeout_s: float = 30.0,
        answer_timeout_s: float = 60.0,
        keep_alive_s: float = 10.0,
    ) -> None:
        """Check the options; entering the session connects it.

        Args:
            url: `host:port` of the server's gRPC port, with or without `grpc://` in front; `grpcs://` is TLS.
            image: the reference image: the bytes of a PNG, JPEG or WebP file, or its path.
            prompt: describes the scene and how the person behaves, at most 2,000 characters.
            seed: the same seed, image, prompt and speech give the same video.
            frame_format: "raw" gives RGB pixels (`Block.frames`), "jpeg" encoded frames (`Block.jpegs`),
                which need far less bandwidth.
            jpeg_quality: from 1 to 95; a higher quality needs more bytes.
            label: a line of at most 64 characters that the server writes on every frame, such as "AI-generated".
            frames_per_response: 12 gives all frames of a block at once. With 4 the first ones come sooner: the server
                sends the frames of each latent as soon as it has decoded them, and a `Block` has four frames.
            idle: send silence at playback pace while there is no speech, so that the avatar keeps moving. Real-time
                speech must then come in chunks of less than 0.24 s.
            speakers: the people in the picture, if each is to speak what only this person says; `send` then tells whose
                speech it is. The server's artifacts must be of as many speakers.
            api_key: the server's API key, if it requires one.
            tls: the certificates of a TLS connection; without it `grpcs://` trusts the public authorities.
            max_in_flight_blocks: the most blocks (0.48 s each) that are sent and not answered.
            max_unread_blocks: the most blocks that are answered and not read; then `send` waits. The default
                holds 30 s of video, which is 664 MB of raw frames of 720 x 400 pixels.
            connect_timeout_s: the longest time that entering the session may take.
            send_timeout_s: how long `send` waits while no block can be sent.
            answer_timeout_s: the longest time that the server may take to answer a request.
            keep_alive_s: after this time without a request the session sends a keep-alive. The server drops sessions
                that send nothing for its idle limit (default 30 s).
        """
        parse_url(url)
        self.url = url
        self._tls = tls
        self._metadata = call_metadata(api_key)
        warn_of_plain_key(url, api_key, tls)
        opening = Opening(
            image_bytes(image),
            _checked_text("prompt", prompt, MAX_PROMPT_CHARS),
            _checked_int("seed", seed, 0, MAX_SEED, "2**63 - 1"),
            _checked_format(frame_format),
            _checked_int("jpeg_quality", jpeg_quality, MIN_JPEG_QUALITY, MAX_JPEG_QUALITY),
            _checked_label(label),
            mask_bytes(speakers),
            _checked_choice("frames_per_response", frames_per_response, FRAMES_PER_RESPONSE),
        )
        self._speakers = opening.speakers
        _require_room(opening)
        _require_positive(
            max_in_flight_blocks=max_in_flight_blocks,
            max_unread_blocks=max_unread_blocks,
            connect_timeout_s=connect_timeout_s,
            send_timeout_s=send_timeout_s,
            answer_timeout_s=answer_timeout_s,
            keep_alive_s=keep_alive_s,
        )
        self._connect_timeout_s = min(connect_timeout_s, LONGEST_WAIT_S)
        limits = Limits(max_in_flight_blocks, max_unread_blocks, send_timeout_s, answer_timeout_s, keep_alive_s)
        self._core = SessionCore(opening, limits, idle=idle)
        self._process = os.getpid()
        self._set_up()

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """Model, version, seed and hashes of the inputs; None until the first frames arrive."""
        return self._core.provenance

    @property
    def lookahead_frames(self) -> int | None:
        """How many frames the server's answers lag behind the speech that was sent; None until the first answer."""
        return self._core.lookahead_frames

    @abstractmethod
    def _set_up(self) -> None:
        """Create the transport's lock and queue, before there is a connection."""

    @abstractmethod
    def _write(self, message: wire.Message | None) -> None:
        """Queue a message for the server; None closes the queue."""

    @abstractmethod
    def _notify(self) -> None:
        """Wake up everyone who waits for the session to change."""

    @contextlib.contextmanager
    def _update(self) -> Iterator[SessionCore]:
        """Lock the core for a change, then send the requests that have become possible."""
        if not self._is_of_this_process():
            raise SessionClosed(
                f"the session belongs to process {self._process}, and this is process {os.getpid()}, forked from it; "
                "open a session in the process that uses it"
            )
        with self._lock:
            try:
                yield self._core
            finally:
                self._flush()
                self._notify()

    def _flush(self) -> bool:
        """Send every request that may be sent now; return whether there was one."""
        sent = False
        while request := self._core.next_request():
            self._write(wire.encode_request(request))
            if request.end:
                self._write(None)
            sent = True
        if sent:
            self._notify()  # a waiting reader has no deadline until there is a request
        return sent

    def _receive(self, message: wire.Message) -> None:
        with self._update() as core:
            if core.has_failed:
                return
            if message.error_message:
                core.receive_error(message.error_message)
                return
            try:
                core.receive(wire.decode_response(message.infer_response))
            except ServerIncompatible as error:
                core.fail(error)

    def _receive_close(self, error: grpc.RpcError | None) -> None:
        with self._update() as core:
            if error is not None and wants_key(error):
                core.fail(self._key_error())
            core.receive_close("the server closed it" if error is None else status_of(error)[1])

    def _is_of_this_process(self) -> bool:
        """Whether this process made the session. A forked child has its locks, but none of its threads."""
        return self._process == os.getpid()

    def _begin_close(self) -> None:
        with self._update() as core:
            core.fail(closed_error())
        self._write(None)

    def _connect_error(self, error: grpc.RpcError) -> AvatarError:
        return (
            self._key_error()
            if wants_key(error)
            else connect_error(self.url, error, self._connect_timeout_s, self._tls)
        )

    def _key_error(self) -> SessionRefused:
        fault = "asks for an API key, and none was given" if self._metadata is None else "does not know the API key"
        return SessionRefused(f"the server at {self.url} {fault}; pass the server's key as api_key")


def closed_error() -> SessionClosed:
    """Return the error of a session that is given up before its speech has ended."""
    return SessionClosed("the session was closed before the last frame; open a new session")


def require_chunks(chunks: object, kinds: type | tuple[type, ...]) -> None:
    """Raise InvalidInput unless `chunks` is one of the iterables `kinds`, and not a chunk itself."""
    is_chunk = isinstance(chunks, (str, bytes, bytearray, memoryview)) or (
        isinstance(chunks, np.ndarray) and chunks.ndim < 2
    )
    if is_chunk or not isinstance(chunks, kinds):
        raise InvalidInput(
            f"stream() got a {type(chunks).__name__}; pass a list or another iterable of chunks, such as [chunk]"
        )


def warn_of_plain_key(url: str, api_key: str | None, tls: TLS | None) -> None:
    """Warn the caller's caller if the API key would go over a network as plain text."""
    if api_key is not None and tls_of(url, tls) is None and not is_loopback(url):
        warnings.warn(
            f"the API key goes to {url} as plain text, so that everybody on the way can read it; use TLS: put grpcs:// "
            "in front of the address, or pass tls",
            AvatarWarning,
            stacklevel=3,
        )


def open_channel(url: str, tls: TLS | None = None) -> grpc.Channel:
    """Return a channel for blocking calls; it connects at the first call. Raises InvalidInput."""
    return cast(grpc.Channel, _open(grpc, url, tls))


def open_async_channel(url: str, tls: TLS | None = None) -> grpc.aio.Channel:
    """Return a channel for asyncio; it connects at the first call. Raises InvalidInput."""
    return cast(grpc.aio.Channel, _open(grpc.aio, url, tls))


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...] | None:
    """Return the metadata that carries this key; raise InvalidInput when it is no valid key."""
    if api_key is None:
        return None
    if not isinstance(api_key, str):
        raise InvalidInput(f"api_key is a {type(api_key).__name__}; pass a str")
    if not re.fullmatch(r"[!-~]+", api_key):
        # The message does not contain the key, because messages go into logs.
        raise InvalidInput("api_key is empty, or has characters beyond visible ASCII; pass the server's key")
    return ((API_KEY_HEADER, api_key),)


def tls_of(url: str, tls: TLS | None) -> TLS | None:
    """Return the certificates for a connection to `url`; None for plain text."""
    return TLS() if tls is None and url.startswith("grpcs://") else tls


def wants_key(error: grpc.RpcError) -> bool:
    """Tell whether a call failed because the API key was missing or wrong."""
    return _RESTRICTED in status_of(error)[1]


def connect_error(url: str, error: grpc.RpcError, timeout_s: float, tls: TLS | None) -> AvatarError:
    """Return the exception for a failure of the first call to a server."""
    code, details = status_of(error)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ServerIncompatible(
            f"the server at {url} speaks gRPC but not KServe v2; pass the address of a Live Avatar server"
        )
    remedy = _connect_remedy(details, is_tls=tls_of(url, tls) is not None)
    return ConnectFailed(f"no server answered at {url} within {timeout_s:g} s: {details}; {remedy}")


def _open(api: ModuleType, url: str, tls: TLS | None) -> object:
    """Return a channel of grpc or grpc.aio."""
    address, tls = parse_url(url), tls_of(url, tls)
    # The environment's proxy is not used for this machine.
    options: tuple[tuple[str, object], ...] = (
        *CHANNEL_OPTIONS,
        ("grpc.enable_http_proxy", int(not is_loopback(url))),
    )
    if tls is None:
        return api.insecure_channel(address, options=options)
    if tls.server_name is not None:
        options = (*options, ("grpc.ssl_target_name_override", tls.server_name))
    return api.secure_channel(address, tls.credentials(), options=options)


def _connect_remedy(details: str, *, is_tls: bool) -> str:
    if is_tls and any(fault in details for fault in _TLS_FAULTS):
        return (
            "the connection is TLS: check that the server's is too, that root_certificates has the authority of its "
            "certificate and that the certificate names the host (else pass server_name), and that the server does "
            "not ask for a certificate of yours"
        )
    remedy = "check that it runs and that this is its gRPC port (8001 unless told otherwise)"
    if any(fault in details for fault in _TLS_FAULTS):
        return f"{remedy}; if it speaks TLS only, put grpcs:// in front of the address or pass tls"
    return remedy


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Return the status and the message of a failed call, the message printable."""
    call = cast(grpc.Call, error)
    return call.code(), printable(call.details() or call.code().name)


def _require_room(opening: Opening) -> None:
    size = len(opening.image) + sum(map(len, opening.masks))
    if size > MAX_IMAGE_BYTES:
        raise InvalidInput(
            f"the image and the masks have {size} bytes, more than {MAX_IMAGE_BYTES}, the limit; save the image smaller"
        )


def _checked_text(name: str, text: str, max_chars: int) -> str:
    if not isinstance(text, str):
        raise InvalidInput(f"{name} is a {type(text).__name__}; pass a str")
    if len(text) > max_chars:
        raise InvalidInput(f"{name} has {len(text)} characters; pass at most {max_chars}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{name} cannot be written as UTF-8: {error.reason} at {error.start}") from error
    return text


def _checked_label(label: str) -> str:
    if not _checked_text("label", label, MAX_LABEL_CHARS).isprintable():
        raise InvalidInput(f"label is {label!r}; pass one line of printable characters")
    return label


def _checked_int(name: str, value: SupportsIndex, lowest: int, highest: int, highest_name: str = "") -> int:
    number = _integer(name, value)
    if not lowest <= number <= highest:
        raise InvalidInput(f"{name} is {number}; pass an int from {lowest} to {highest_name or highest}")
    return number


def _integer(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise InvalidInput(f"{name} is a {type(value).__name__}; pass an int") from error


def _checked_choice(name: str, value: SupportsIndex, choices: Sequence[int]) -> int:
    number = _integer(name, value)
    if number not in choices:
        raise InvalidInput(f"{name} is {number}; pass {' or '.join(map(str, choices))}")
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
