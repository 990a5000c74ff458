"""Triton's models of a profile: what each takes and gives, its device and limits, and the ensemble that connects them.

A tensor has one type under one name everywhere, so the ensemble follows from the names that the stages share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tritonclient.grpc import model_config_pb2

from live_avatar.graphs.memory import CONDITIONING, DECODER
from live_avatar.serving.profiles import Place, Profile
from live_avatar.serving.steps import STEPS_PARAMETER, steps_text
from live_avatar.serving.tensors import (
    AUDIO_GLOBAL,
    AUDIO_LOCAL,
    AUDIO_WEIGHT,
    AVATAR_ENCODER,
    AVATAR_KEY,
    BLOCK,
    FAILURE,
    LATENT,
    OPERATION,
    PIXELS,
    PROVENANCE_IN,
    RECEIVED_NS,
    ROLLING_SINK,
    SESSION,
    SINK_KEY,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
    SPEAKER_WEIGHTS,
    STATE,
)
from live_avatar_client import protocol

CANDIDATES: Final = 4
"""Sequences that a batcher takes per session, so that a new session does not wait for those that were left without an
end."""
LEAST_CANDIDATES: Final = 1024

AUDIO, PROMPT, PROVENANCE = protocol.AUDIO.name, protocol.PROMPT.name, protocol.PROVENANCE.name
FIRST_FRAME = protocol.FIRST_FRAME.name
TENSORS: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    **{spec.name: (spec.datatype, spec.dims) for spec in (protocol.AUDIO, protocol.PROMPT, *protocol.OUTPUTS)},
    AUDIO_GLOBAL: ("FP32", (-1, -1, -1)),
    AUDIO_LOCAL: ("FP32", (-1, -1, -1, -1)),
    AUDIO_WEIGHT: ("FP32", (-1, -1, -1)),
    AVATAR_KEY: ("UINT8", (-1,)),
    BLOCK: ("INT64", (1,)),
    FAILURE: ("UINT8", (-1,)),
    LATENT: ("FP32", (-1, 16, -1, -1, -1)),
    OPERATION: ("BYTES", (1,)),
    PIXELS: ("UINT8", (-1, -1, 3)),
    PROVENANCE_IN: ("UINT8", (-1,)),
    RECEIVED_NS: ("INT64", (1,)),
    SESSION: ("UINT64", (1,)),
    SINK_KEY: ("UINT64", (1,)),
    SINK_MOTION: ("FP32", (-1, 16, -1, -1, -1)),
    SINK_REFERENCE: ("FP32", (-1, 16, 1, -1, -1)),
    SINK_TEXT: ("FP32", (-1, -1)),
    SPEAKER_WEIGHTS: ("FP32", (-1, -1)),
    STATE: ("UINT8", (-1,)),
}
"""Type and dimensions of every tensor between the models; `serving.tensors` says what they hold."""


@dataclass(frozen=True)
class Kind:
    """Models of one class of `triton_model`. The tensors in `optional` come with START alone."""

    code: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    keeps_sessions: bool = True
    keeps_avatars: bool = True


OPENING: Final = (AVATAR_KEY, SINK_MOTION, SINK_TEXT, SPEAKER_WEIGHTS, PROVENANCE_IN)
CONDITIONING_KIND: Final = Kind(
    "ConditioningModel",
    (AUDIO, *OPENING),
    (
        BLOCK,
        FIRST_FRAME,
        LATENT,
        AUDIO_LOCAL,
        AUDIO_GLOBAL,
        AUDIO_WEIGHT,
        SINK_REFERENCE,
        SINK_MOTION,
        SINK_TEXT,
        AVATAR_KEY,
        SINK_KEY,
        RECEIVED_NS,
        FAILURE,
        PROVENANCE,
    ),
    optional=OPENING,
    keeps_avatars=False,
)
DENOISER_KIND: Final = Kind(
    "DenoiserModel",
    (
        BLOCK,
        LATENT,
        AUDIO_LOCAL,
        AUDIO_GLOBAL,
        AUDIO_WEIGHT,
        SINK_REFERENCE,
        SINK_MOTION,
        SINK_TEXT,
        SINK_KEY,
        AVATAR_KEY,
        FAILURE,
    ),
    (LATENT, FAILURE),
)
DECODER_KIND: Final = Kind(
    "VAEDecoderModel",
    (BLOCK, LATENT, SINK_MOTION, AVATAR_KEY, RECEIVED_NS, FAILURE, FIRST_FRAME, PROVENANCE),
    tuple(spec.name for spec in protocol.OUTPUTS),
)
ENCODER_KIND: Final = Kind(
    "AvatarEncoderModel", (PIXELS, PROMPT), (SINK_MOTION, SINK_TEXT), keeps_sessions=False, keeps_avatars=False
)
SINK_KIND: Final = Kind(
    "RollingSinkModel", (OPERATION, SESSION, LATENT), (STATE, LATENT), keeps_sessions=False, keeps_avatars=False
)


KINDS: Final = {
    CONDITIONING: CONDITIONING_KIND,
    DECODER: DECODER_KIND,
    AVATAR_ENCODER: ENCODER_KIND,
    ROLLING_SINK: SINK_KIND,
}
"""Kinds of the models that every profile has, by name."""


def kind_of(place: Place) -> Kind:
    """The kind of a stage's model."""
    return DENOISER_KIND if place.steps else KINDS[place.name]


def beside_the_pipe(profile: Profile) -> tuple[Place, ...]:
    """The models that are served in addition to those of the ensemble."""
    return Place(ROLLING_SINK, None), Place(AVATAR_ENCODER, profile.encoder_gpu)


def model_config(place: Place, profile: Profile, idle_margin_s: float = 0.0) -> model_config_pb2.ModelConfig:
    """The configuration of a stage's model. Its sequences live `idle_margin_s` longer than the profile's idle limit."""
    kind = kind_of(place)
    config = model_config_pb2.ModelConfig(name=place.name, backend="python")
    _tensors(config, kind.inputs, kind.outputs, kind.optional)
    group = config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    if place.gpu is not None:
        group.kind = model_config_pb2.ModelInstanceGroup.KIND_GPU
        group.gpus.append(place.gpu)
    if kind.keeps_sessions:
        batching = config.sequence_batching
        batching.max_sequence_idle_microseconds = round((profile.idle_seconds + idle_margin_s) * 1e6)
        batching.oldest.max_candidate_sequences = max(LEAST_CANDIDATES, CANDIDATES * profile.max_sessions)
    for name, value in _parameters(place, kind, profile).items():
        config.parameters[name].string_value = value
    return config


def ensemble_config(profile: Profile) -> model_config_pb2.ModelConfig:
    """The pipe, which only the gateway calls. Every stage has its own sequence batcher, so while a stage works on block
    i of a session, the one before it works on block i + 1: timestep-forcing pipeline parallelism.

    Every output comes from the last stage: Triton leaves out stages that the outputs a client asks for do not need.
    """
    config = model_config_pb2.ModelConfig(name=protocol.MODEL_NAME, platform="ensemble")
    _tensors(config, CONDITIONING_KIND.inputs, DECODER_KIND.outputs, CONDITIONING_KIND.optional)
    latest = {name: name for name in CONDITIONING_KIND.inputs}
    for number, place in enumerate(profile.chain):
        kind, is_last = kind_of(place), number == len(profile.chain) - 1
        step = config.ensemble_scheduling.step.add(model_name=place.name, model_version=-1)
        for name in kind.inputs:
            step.input_map[name] = latest[name]
        for name in kind.outputs:
            latest[name] = step.output_map[name] = name if is_last else f"{name}_{number}"
    return config


def _parameters(place: Place, kind: Kind, profile: Profile) -> dict[str, str]:
    if kind is SINK_KIND:
        return {"idle_limit_s": f"{profile.idle_seconds:g}"}
    parameters = {}
    if kind.keeps_sessions:
        parameters["max_sessions"] = str(profile.max_sessions)
    if kind.keeps_avatars:
        parameters["known_avatars"] = str(profile.known_avatars)
    if place.steps is not None:
        parameters[STEPS_PARAMETER] = steps_text(place.steps)
    return parameters


def _tensors(
    config: model_config_pb2.ModelConfig, inputs: Iterable[str], outputs: Iterable[str], optional: Iterable[str]
) -> None:
    for name in inputs:
        datatype, dims = TENSORS[name]
        config.input.add(name=name, data_type=_type(datatype), dims=dims, optional=name in optional)
    for name in outputs:
        datatype, dims = TENSORS[name]
        config.output.add(name=name, data_type=_type(datatype), dims=dims)


def _type(datatype: str) -> model_config_pb2.DataType:
    """Triton's number of a type that the protocol names."""
    return model_config_pb2.DataType.Value(f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}")
