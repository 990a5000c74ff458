"""A client without manners: sends single requests of any shape to the ensemble and gives back what comes."""

from __future__ import annotations

import itertools
import queue
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from live_avatar.arrays import Array
from live_avatar_client.protocol import API_KEY_HEADER

BLOCK, NOTHING = np.zeros(7680, dtype=np.int16), np.zeros(0, dtype=np.int16)
DATATYPES = {"int16": "INT16", "uint8": "UINT8", "object": "BYTES", "float32": "FP32", "int32": "INT32"}
ANSWER_S = 180.0
_ids = itertools.count(1000)


class RawSession:
    """One sequence id on one stream; `ask` waits for the answer of each request, `send` does not."""

    def __init__(self, client: triton.InferenceServerClient, session: int | str, api_key: str | None = None) -> None:
        self._client = client
        self._gone = False
        self.session = session
        self._answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        headers = None if api_key is None else {API_KEY_HEADER: api_key}
        client.start_stream(lambda result, error: self._answers.put((result, error)), headers=headers)

    def ask(self, *args: Any, **parameters: Any) -> Any:
        """Sends what `send` takes; the answer, or the words of the error."""
        self.send(*args, **parameters)
        return self.answer()

    def send(
        self,
        audio: Array | None = BLOCK,
        image: bytes | None = None,
        prompt: bytes | None = None,
        start: bool = False,
        end: bool = False,
        **parameters: Any,
    ) -> None:
        arrays = {
            "AUDIO": audio,
            "REFERENCE_IMAGE": None if image is None else np.frombuffer(image, dtype=np.uint8),
            "PROMPT": None if prompt is None else np.array([prompt], dtype=np.object_),
        }
        inputs = []
        for name, array in arrays.items():
            if array is not None:
                tensor = triton.InferInput(name, list(array.shape), DATATYPES[str(array.dtype)])
                tensor.set_data_from_numpy(array)
                inputs.append(tensor)
        self._client.async_stream_infer(
            "live_avatar",
            inputs,
            sequence_id=self.session,
            sequence_start=start,
            sequence_end=end,
            parameters=parameters or None,
        )

    def answer(self) -> Any:
        """The next answer, or the words of the error."""
        result, error = self._answers.get(timeout=ANSWER_S)
        return str(error) if error else result

    def vanish(self) -> None:
        """Cancels the call with all that is under way, and sends no END."""
        self._client.stop_stream(cancel_requests=True)
        self._gone = True

    def close(self) -> None:
        """Ends the sequence whatever state it is in."""
        if self._gone:
            return
        self.ask(NOTHING, end=True)
        self._client.stop_stream()


@contextmanager
def raw_session(url: str, session: int | str | None = None, api_key: str | None = None) -> Iterator[RawSession]:
    with triton.InferenceServerClient(url) as client:
        raw = RawSession(client, next(_ids) if session is None else session, api_key)
        try:
            yield raw
        finally:
            raw.close()


def header_of_a_huge_png(side: int) -> bytes:
    """A valid PNG header that promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = zlib.compress(b"\0" * 1000)
    body = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return b"\x89PNG\r\n\x1a\n" + chunk + body
