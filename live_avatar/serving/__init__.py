"""The code of the Triton models. Logic takes and gives plain arrays; `triton_model` alone knows Triton's API."""

ARTIFACTS_VARIABLE = "LIVE_AVATAR_ARTIFACTS"
"""Environment variable with the artifacts folder that the stages load."""
TRACE_VARIABLE = "LIVE_AVATAR_TRACE"
"""Environment variable with a folder where each stage writes its busy intervals; unset for none."""
FLOOR_VARIABLE = "LIVE_AVATAR_STAGE_FLOOR_S"
"""Environment variable with the least time a stage takes for a block, in seconds; unset for none.

A measuring aid: with equal stages that do not share cores, what is left is the serving path itself."""
