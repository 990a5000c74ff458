"""Speaks typed text: espeak-ng in a process of its own, or an endpoint that follows OpenAI's `/v1/audio/speech`."""

import asyncio
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import numpy as np
import soxr

from ..cutter import Samples
from ..errors import AvatarError, InvalidInput
from ..protocol import SAMPLE_RATE_HZ
from .options import TextToSpeech, WebOptions
from .protocol import MAX_TEXT_CHARS

_ESPEAK_S: Final = 20.0
_ENDPOINT_S: Final = 30.0
_ENDPOINT_RATE_HZ: Final = 24_000
"""Of the format `pcm` of that endpoint: int16, mono."""
_CHUNK_BYTES: Final = 9_600
_MAX_SOUND_BYTES: Final = 300 * _ENDPOINT_RATE_HZ * 2


class VoiceError(AvatarError):
    """The text could not be spoken; the session goes on."""


class Voice(Protocol):
    """Something that speaks."""

    def speech(self, text: str) -> AsyncIterator[Samples]:
        """Yield the speech of a text, int16 at 16 kHz, as it is made; raise AvatarError."""


def voice_of(options: WebOptions) -> Voice:
    """Return the voice that the options choose."""
    return Espeak(options.voice) if options.text_to_speech is None else Endpoint(options.text_to_speech)


def checked_text(text: str) -> str:
    """Return the text without its outer spaces; raise InvalidInput when it is empty or too long."""
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidInput(f"the text has {len(text)} characters; send at most {MAX_TEXT_CHARS} at a time")
    if not text.strip():
        raise InvalidInput("the text is empty; type at least one word")
    return text.strip()


class Espeak:
    """espeak-ng in a process for each text: a text that it cannot bear ends that process only."""

    def __init__(self, voice: str) -> None:
        self._command = (sys.executable, "-m", "live_avatar_client.espeak", voice)

    async def speech(self, text: str) -> AsyncIterator[Samples]:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_ESPEAK_S):
                sound, said = await process.communicate(text.encode("utf-8", "replace"))
        except TimeoutError as error:
            raise VoiceError(f"the voice took longer than {_ESPEAK_S:g} s; send a shorter text") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            reason = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise VoiceError(f"the text cannot be spoken: {reason or 'the voice has failed'}")
        samples = np.frombuffer(sound, "<i2").astype(np.int16)
        if not samples.any():
            raise VoiceError("the text has nothing that can be spoken; type words")
        yield samples


class Endpoint:
    """A server with OpenAI's `/v1/audio/speech`; its sound is passed on as it comes."""

    def __init__(self, options: TextToSpeech) -> None:
        self._options = options

    async def speech(self, text: str) -> AsyncIterator[Samples]:
        resampler = soxr.ResampleStream(_ENDPOINT_RATE_HZ, SAMPLE_RATE_HZ, 1, dtype="int16")
        rest, size = b"", 0
        answer = await self._try(self._request, text)
        try:
            while data := await self._try(answer.read1, _CHUNK_BYTES):
                size += len(data)
                if size > _MAX_SOUND_BYTES:
                    raise VoiceError(f"the voice sent more than {_MAX_SOUND_BYTES} bytes for one text; type a shorter")
                whole = (len(rest) + len(data)) // 2 * 2
                data = rest + data
                rest = data[whole:]
                yield resampler.resample_chunk(np.frombuffer(data[:whole], "<i2"))
            yield resampler.resample_chunk(np.zeros(0, np.int16), last=True)
        finally:
            answer.close()
        if not size:
            raise VoiceError("the voice sent no sound for the text; type words")

    async def _try(self, function: Any, argument: Any) -> Any:
        """Call a blocking function in a thread; its errors do not name the address, which visitors need not know."""
        try:
            return await asyncio.to_thread(function, argument)
        except urllib.error.HTTPError as error:
            error.close()
            raise VoiceError(f"the voice's server answered {error.code}; tell the page's operator") from error
        except (OSError, http.client.HTTPException) as error:
            raise VoiceError("the voice's server does not answer; tell the page's operator") from error

    def _request(self, text: str) -> Any:
        options = self._options
        body = {"model": options.model, "voice": options.voice, "input": text, "response_format": "pcm"}
        headers = {"Content-Type": "application/json"}
        if options.api_key is not None:
            headers["Authorization"] = f"Bearer {options.api_key}"
        request = urllib.request.Request(options.url, json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=_ENDPOINT_S)
