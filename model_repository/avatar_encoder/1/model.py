from live_avatar.serving.triton_model import AvatarEncoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
