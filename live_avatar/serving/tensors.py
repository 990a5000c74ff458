"""Names of the tensors between the stages of the ensemble.

The names that clients see are in `live_avatar_client.protocol`. Tensors of a request without speech, and a sink that
does not change, have zero rows. Text is UINT8, because no output may be of type BYTES (`protocol` says why).
"""

from __future__ import annotations

import numpy as np

from live_avatar.arrays import Array

BLOCK = "BLOCK"  # INT64 [1]: block number from 0, or NO_BLOCK
LATENT = "LATENT"  # FP32 [1 or 0, 16, F, h, w]: noise at first, clean at last
AUDIO_LOCAL = "AUDIO_LOCAL"  # FP32 [speakers or 0, F, n + 1, C]
AUDIO_GLOBAL = "AUDIO_GLOBAL"  # FP32 [speakers or 0, F, C]
AUDIO_WEIGHT = "AUDIO_WEIGHT"  # FP32 [speakers or 0, F, S]: how much the speech of each speaker moves each token
SINK_REFERENCE = "SINK_REFERENCE"  # FP32 [1 or 0, 16, 1, h, w]
SINK_MOTION = "SINK_MOTION"  # FP32 [1 or 0, 16, 19, h, w]
SINK_TEXT = "SINK_TEXT"  # FP32 [text_len or 0, text_dim]
AVATAR_KEY = "AVATAR"  # UINT8 [32 or 0]: with START, cache key of the avatar
SINK_KEY = "SINK_KEY"  # UINT64 [1]: key of the session's entry in the rolling sink; never reused
RECEIVED_NS = "RECEIVED_NS"  # INT64 [1]: monotonic clock of this machine when conditioning took the request
FAILURE = "FAILURE"  # UINT8 [n]: text, `[CODE] sentence` if the session has failed in an earlier stage; else empty
SPEAKER_WEIGHTS = "SPEAKER_WEIGHTS"  # FP32 [speakers, S]: with START, if there are several speakers
PROVENANCE_IN = "PROVENANCE_IN"  # UINT8 [n]: with START and a block that came with it; comes out as PROVENANCE

NO_BLOCK = -1
"""Value of BLOCK in a request without speech: a keep-alive, or an end alone."""

AVATAR_ENCODER = "avatar_encoder"
"""The model that encodes a picture and a prompt; the gateway calls it before a session starts."""
PIXELS = "PIXELS"  # UINT8 [H, W, 3]: a picture of the preset's size; an input of avatar_encoder

ROLLING_SINK = "rolling_sink"
"""The model that holds new sinks; the stages call it."""
OPERATION = "OPERATION"  # BYTES [1]: put, take or fail
SESSION = "SESSION"  # UINT64 [1]: a SINK_KEY
STATE = "STATE"  # UINT8 [n]: text, ready, absent or failed


def text_tensor(text: str) -> Array:
    """UTF-8 as UINT8 [n]."""
    return np.frombuffer(text.encode(), dtype=np.uint8)


def read_text(tensor: Array) -> str:
    return tensor.tobytes().decode()
