"""The code of the Triton models. Logic takes and gives plain arrays; `triton_model` alone knows Triton's API.

What the supervisor (`live-avatar serve`) tells the stages stands in the environment, under the names here.
"""

ARTIFACTS_VARIABLE = "LIVE_AVATAR_ARTIFACTS"
"""The artifacts folder that the stages load."""
PROFILE_VARIABLE = "LIVE_AVATAR_PROFILE"
"""Name of the hardware profile, for metrics and status."""
CONTROL_VARIABLE = "LIVE_AVATAR_CONTROL"
"""A folder through which supervisor and stages talk (`control`); unset when there is no supervisor."""
LABEL_FONT_VARIABLE = "LIVE_AVATAR_LABEL_FONT"
"""A font file for visible labels; unset for the built-in font."""
TRACE_VARIABLE = "LIVE_AVATAR_TRACE"
"""A folder where each stage writes its busy intervals; unset for none."""
FLOOR_VARIABLE = "LIVE_AVATAR_STAGE_FLOOR_S"
"""The least time a stage takes for a block, in seconds; unset for none.

A measuring aid: with equal stages that do not share cores, what is left is the serving path itself."""
TURNS_VARIABLE = "LIVE_AVATAR_TURNS"
"""A lock file and the stages that take turns by it (`turns`); unset for none. A measuring aid."""
LOG_MARK = " live-avatar "
"""What every line has that a stage writes into the log."""
