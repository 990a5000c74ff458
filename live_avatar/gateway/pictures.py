import numpy as np

from live_avatar.inputs.image import decode_image


class PictureDecoder:
    async def decode(self, data, height, width):
        return np.ascontiguousarray(
            ((decode_image(data, height, width) + 1) * 127.5).round().transpose(1, 2, 0).astype(np.uint8)
        )

    def close(self):
        pass
