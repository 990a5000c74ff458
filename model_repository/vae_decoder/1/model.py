from live_avatar.serving.triton_model import VAEDecoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
