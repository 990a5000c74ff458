"""One visitor's conversation: what comes over the WebSocket goes to a session, and its blocks come back.

A conversation ends when the visitor leaves, when the session fails, or with a message that breaks the protocol. Nothing
that a visitor sends is kept or logged; what is shown is kept in memory if the visitor records it.
"""

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect

from ..aio import AsyncAvatarSession
from ..errors import (
    AnswerTimeout,
    AvatarError,
    ConnectFailed,
    ConnectionLost,
    InvalidInput,
    ServerError,
    ServerIncompatible,
)
from ..image import read_image_bytes
from ..protocol import FRAMES_PER_LATENT, ErrorCode, FrameFormat
from .feeder import SpeechFeeder
from .guard import Guard, RefusalError
from .options import WebOptions
from .protocol import (
    MAX_PICTURE_BYTES,
    Fault,
    Interrupt,
    Message,
    Picture,
    ProtocolError,
    Record,
    Say,
    Speech,
    Start,
    block_message,
    error,
    parse,
    ready,
    record_ended,
    record_started,
)
from .recording import Recording, Recordings
from .voices import Voice, checked_text

_OPENING_S: Final = 10.0
"""How long the first messages may take."""
_SENDING_S: Final = 10.0
"""How long a message may wait for a visitor that does not read."""
_MOST_MESSAGES: Final = 200
"""That one visitor may send in a second; a microphone sends 25."""
_MOST_TEXTS: Final = 8
"""That may wait to be spoken."""
_UNREAD_BLOCKS: Final = 8
_HIDDEN: Final = {
    Fault.NO_SERVER: "the avatar's server does not answer; try again in a while",
    Fault.LOST: "the avatar's server has ended the conversation; start again",
}
"""What visitors from elsewhere are told instead of the cause."""
_LOG: Final = logging.getLogger("live_avatar_client.web")
_PROTOCOL_CLOSE, _LATER_CLOSE, _SLOW_CLOSE = 1002, 1013, 1008


class Visitor:
    """The other end of a WebSocket: its messages, counted, and ours, in whole."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._second = 0
        self._messages = 0

    async def receive(self) -> Message:
        """Wait for the next message; raises WebSocketDisconnect, or ProtocolError for what is no message."""
        event = await self._socket.receive()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1006))
        self._count()
        text, data = event.get("text"), event.get("bytes")
        return parse(text if text is not None else data or b"")

    async def send(self, message: dict[str, Any] | bytes) -> None:
        """Send a message; raise TimeoutError if the visitor has read nothing for too long."""
        async with asyncio.timeout(_SENDING_S):
            if isinstance(message, bytes):
                await self._socket.send_bytes(message)
            else:
                await self._socket.send_json(message)

    async def close(self, code: int) -> None:
        with contextlib.suppress(RuntimeError, TimeoutError, WebSocketDisconnect):  # it has left
            async with asyncio.timeout(_SENDING_S):
                await self._socket.close(code)

    def _count(self) -> None:
        second = int(time.monotonic())
        self._messages = self._messages + 1 if second == self._second else 1
        self._second = second
        if self._messages > _MOST_MESSAGES:
            raise ProtocolError(f"more than {_MOST_MESSAGES} messages came in a second; send speech in larger pieces")


async def converse(socket: WebSocket, options: WebOptions, guard: Guard, voice: Voice, recordings: Recordings) -> None:
    """Serve an accepted WebSocket to its end."""
    visitor = Visitor(socket)
    address = socket.client.host if socket.client else ""
    try:
        with guard.place(address):
            session = await _opened(visitor, options, guard)
            async with session:
                await _Conversation(visitor, session, voice, lambda: recordings.begin(address)).run()
    except (WebSocketDisconnect, TimeoutError) as end:
        # grpc's and our own time limits are AvatarErrors too, and those are told.
        if isinstance(end, AvatarError):
            await _tell(visitor, end, options)
        else:
            await visitor.close(_SLOW_CLOSE)
    except (AvatarError, RefusalError) as end:
        await _tell(visitor, end, options)
    except Exception as defect:
        # The message may have a visitor's words in it.
        place = traceback.extract_tb(defect.__traceback__)[-1]
        _LOG.error("a conversation ended with %s at %s:%d", type(defect).__name__, place.filename, place.lineno)
        await _tell(visitor, AvatarError("the page's server has failed; try again"), options)


async def _opened(visitor: Visitor, options: WebOptions, guard: Guard) -> AsyncAvatarSession:
    """Read the settings of a session and, unless it has a portrait's name, the picture."""
    try:
        async with asyncio.timeout(_OPENING_S):
            start = await visitor.receive()
            if not isinstance(start, Start):
                raise ProtocolError(f"the first message is a {type(start).__name__.lower()}; send session.start first")
            await guard.check_key(start.key)
            image = await _image(visitor, start, options)
    except TimeoutError:
        raise ProtocolError(f"no session.start came within {_OPENING_S:g} s; send it at once") from None
    return AsyncAvatarSession(
        options.url,
        image=image,
        prompt=start.prompt,
        seed=start.seed,
        label=start.label,
        frame_format=FrameFormat.JPEG,
        jpeg_quality=start.jpeg_quality,
        frames_per_response=FRAMES_PER_LATENT,
        idle=True,
        api_key=options.api_key,
        tls=options.tls,
        max_unread_blocks=_UNREAD_BLOCKS,
    )


async def _image(visitor: Visitor, start: Start, options: WebOptions) -> bytes:
    if start.portrait is not None:
        if start.portrait not in options.portraits:
            names = ", ".join(options.portraits) or "none"
            raise InvalidInput(f"there is no portrait {start.portrait[:40]!r}; choose one of: {names}")
        return await asyncio.to_thread(read_image_bytes, options.portraits[start.portrait])
    picture = await visitor.receive()
    if not isinstance(picture, Picture):
        raise ProtocolError(f"a {type(picture).__name__.lower()} came instead of the picture; send it after the start")
    if len(picture.data) > MAX_PICTURE_BYTES:
        raise InvalidInput(
            f"the picture has {len(picture.data)} bytes; send at most {MAX_PICTURE_BYTES}, scaled down to what is shown"
        )
    return picture.data


class _Conversation:
    """A session that is open, and its visitor."""

    def __init__(
        self, visitor: Visitor, session: AsyncAvatarSession, voice: Voice, record: Callable[[], Recording]
    ) -> None:
        self._visitor = visitor
        self._session = session
        self._voice = voice
        self._feeder = SpeechFeeder(session)
        self._turn = 0
        self._texts: asyncio.Queue[str] = asyncio.Queue(_MOST_TEXTS)
        self._speaking: asyncio.Task[None] | None = None
        self._record = record
        self._recordings: asyncio.Queue[Recording] = asyncio.Queue()
        self._recording: Recording | None = None

    async def run(self) -> None:
        """Go on until one of the directions ends, and raise its error."""
        works = (self._listen(), self._feeder.run(), self._speak_texts(), self._show(), self._watch_recordings())
        try:
            await _first_end(*works)
        finally:
            if self._recording is not None:
                self._recording.stop()

    async def _listen(self) -> None:
        while True:
            try:
                await self._take(await self._visitor.receive())
            except ProtocolError:
                raise
            except InvalidInput as fault:
                await self._visitor.send(error(Fault.INVALID, str(fault), ends=False))

    async def _take(self, message: Message) -> None:
        match message:
            case Interrupt(turn):
                await self._interrupt(turn)
            case Speech(samples, turn) if turn == self._turn:
                self._feeder.add(samples)
            case Say(text, turn) if turn == self._turn:
                self._queue_text(checked_text(text))
            case Record():
                await self._begin_recording()
            case Speech() | Say():
                pass  # of a turn that was interrupted, or is not known
            case _:
                raise ProtocolError(f"a {type(message).__name__.lower()} came after the start; open another connection")

    def _queue_text(self, text: str) -> None:
        try:
            self._texts.put_nowait(text)
        except asyncio.QueueFull:
            raise InvalidInput(f"{_MOST_TEXTS} texts wait to be spoken; send more when one has been") from None

    async def _interrupt(self, turn: int) -> None:
        """Begin a turn: forget the speech of the one before, wherever it is."""
        if turn <= self._turn:
            raise ProtocolError(f"the turn {turn} begins after turn {self._turn}; count up")
        self._turn = turn
        while not self._texts.empty():
            self._texts.get_nowait()
        if self._speaking is not None:
            self._speaking.cancel()
        self._feeder.drop()
        await self._session.interrupt()

    async def _begin_recording(self) -> None:
        if self._recording is not None and not self._recording.ended.is_set():
            raise InvalidInput("a recording is under way; save it before you begin another")
        self._recording = self._record()
        self._recordings.put_nowait(self._recording)
        await self._visitor.send(record_started(self._recording.path))

    async def _watch_recordings(self) -> None:
        """Tell the visitor of recordings that end by themselves."""
        while True:
            recording = await self._recordings.get()
            await recording.ended.wait()
            if not recording.is_wanted:
                await self._visitor.send(record_ended(recording.sentence))

    async def _speak_texts(self) -> None:
        while True:
            text = await self._texts.get()
            self._speaking = asyncio.create_task(self._speak(text))
            await asyncio.wait([self._speaking])
            if not self._speaking.cancelled() and (fault := self._speaking.exception()):
                if not isinstance(fault, AvatarError):
                    raise fault
                await self._visitor.send(error(Fault.INVALID, str(fault), ends=False))

    async def _speak(self, text: str) -> None:
        async for samples in self._voice.speech(text):
            await self._feeder.add_when_room(samples)

    async def _show(self) -> None:
        is_first = True
        async for block in self._session:
            if is_first:
                await self._visitor.send(ready(self._session.provenance or {}))
                is_first = False
            if not block.stale:
                await self._visitor.send(block_message(block, self._turn))
                if self._recording is not None:
                    self._recording.add(block, self._session.provenance or {})


async def _first_end(*works: Coroutine[Any, Any, None]) -> None:
    """Run until one of the works ends, cancel the others, and raise its error."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _tell(visitor: Visitor, end: Exception, options: WebOptions) -> None:
    """Send the last message and close."""
    fault, message = _fault(end), str(end)
    if fault in _HIDDEN and not options.is_local:  # addresses and stages behind the page are not for visitors
        message = _HIDDEN[fault]
    with contextlib.suppress(RuntimeError, TimeoutError, WebSocketDisconnect):
        await visitor.send(error(fault, message))
    is_later = fault in (Fault.FULL, Fault.NO_SERVER, Fault.LOST)
    await visitor.close(_LATER_CLOSE if is_later else _PROTOCOL_CLOSE)


def _fault(end: Exception) -> Fault:
    match end:
        case RefusalError():
            return end.fault
        case ProtocolError():
            return Fault.PROTOCOL
        case ServerError(code=ErrorCode.UNAVAILABLE):
            return Fault.FULL
        case InvalidInput() | ServerError(code=ErrorCode.INVALID_ARGUMENT):
            return Fault.INVALID
        case ConnectFailed() | ServerIncompatible():
            return Fault.NO_SERVER
        case ConnectionLost() | AnswerTimeout():
            return Fault.LOST
        case ServerError(code=None):  # a key that the server does not know, or Triton's own words
            return Fault.NO_SERVER
        case _:
            return Fault.LOST
