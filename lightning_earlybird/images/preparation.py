"""From the bytes of an image file to pixels of one shape."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_earlybird.images import celeba
from lightning_earlybird.images.damage import not_the_data
from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.listing import RawImage

if TYPE_CHECKING:
    from PIL import Image

# What Pillow raises for damaged files, found by mutating some; it promises OSError only, and warns of some damage.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    Warning,
)
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Preparation:
    """What is done to every image: crop, then resize, in the colours that are wanted.

    Args:
        size: Height and width of the result in pixels; ``None`` keeps that of the (cropped) images. Where the shape
            differs from what is left after the crop, the largest centred part of the right proportions is taken, so
            that nothing is distorted. Resized as torchvision does it: bilinear, with antialiasing.
        crop: Side of a centred square in pixels, or ``(left, top, right, bottom)``, or ``"celeba"``; ``None``: nothing.
        channels: ``"RGB"`` or ``"L"`` (grey).

    Raises:
        ValueError: One of them has no such meaning.
    """

    size: tuple[int, ...] | None
    crop: int | str | tuple[int, ...] | None
    channels: Literal["RGB", "L"]

    def __post_init__(self) -> None:
        if self.size is not None and not (len(self.size) == 2 and all(map(_is_count, self.size))):
            raise ValueError(
                f"size={self.size!r} must be a number of pixels, at least 1, or two of them: (height, width)."
            )
        if self.channels not in ("RGB", "L"):
            raise ValueError(f"channels={self.channels!r} must be 'RGB' or 'L' (grey).")
        if not (self.crop in (None, "celeba") or _is_count(self.crop) or _is_box(self.crop)):
            raise ValueError(
                f"crop={self.crop!r} must be the side of a centred square in pixels, (left, top, right, bottom) or "
                "'celeba'."
            )

    def apply(self, raw: RawImage, name: str) -> tuple[NDArray[np.uint8], str]:
        """Decode and prepare one image.

        Args:
            raw: The bytes of an image file, or pixels of shape (height, width, 3).
            name: The image, for messages.

        Returns:
            Pixels of shape (channels, height, width), and what had to be converted ("" for nothing).

        Raises:
            ImageDataError: It cannot be decoded, is of a kind that would lose by it, or too small for the crop.
        """
        from PIL import Image

        if isinstance(raw, np.ndarray):
            if self.crop is None and self.size in (None, raw.shape[:2]) and self.channels == "RGB":
                return raw.transpose(2, 0, 1), ""
            image, converted = Image.fromarray(np.ascontiguousarray(raw)), ""
        else:
            image, converted = _coloured(_decode(raw, name), name)
        if image.mode != self.channels:
            # From colour to grey was asked for; from grey to colour is worth a word.
            converted = converted or ("L" if image.mode == "L" else "")
            image = image.convert(self.channels)
        box = self._box(image.width, image.height, name)
        if box is not None:
            # Not resize(box=...), whose antialiasing mixes in what lies around the box.
            image = image.crop(box)
        if self.size is not None and self.size != (image.height, image.width):
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), converted

    def _box(self, width: int, height: int, name: str) -> tuple[int, int, int, int] | None:
        """The part of the image that is used: left, top, right, bottom; ``None`` for all of it."""
        if self.crop == "celeba" and (height, width) != celeba.SHAPE:
            raise ImageDataError(
                f"{name} is {width} x {height} pixels large, and crop='celeba' is meant for the aligned images of "
                "178 x 218; give the side of a centred square, or (left, top, right, bottom)."
            )
        if isinstance(self.crop, int):
            left, top = (width - self.crop) // 2, (height - self.crop) // 2
            box: tuple[int, ...] = (left, top, left + self.crop, top + self.crop)
        else:
            box = celeba.CROP
            if self.crop != "celeba":
                box = self.crop if isinstance(self.crop, tuple) else (0, 0, width, height)
        if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
            raise ImageDataError(f"{name} is {width} x {height} pixels large, too small for crop={self.crop!r}.")
        if self.size is not None:
            box = _of_proportion(box, self.size)
        return None if box == (0, 0, width, height) else (box[0], box[1], box[2], box[3])


def _of_proportion(box: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """The largest centred part of a box that has the proportions of ``size`` (height, width), to a pixel."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if width * size[0] > height * size[1]:
        wanted = max(1, round(height * size[1] / size[0]))
        left += (width - wanted) // 2
        right = left + wanted
    elif width * size[0] < height * size[1]:
        wanted = max(1, round(width * size[0] / size[1]))
        top += (height - wanted) // 2
        bottom = top + wanted
    return left, top, right, bottom


def _decode(data: bytes, name: str) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            image.load()
            return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageDataError(
            f"{name} would be too large once decoded ({error}), as files are that were made to fill the memory; remove "
            "it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is meant."
        ) from error
    except _DAMAGE as error:
        reason = not_the_data(data[:512]) or f"it is damaged or cut off ({error}): copy it again, or remove it"
        raise ImageDataError(f"{name} ({len(data):,} bytes) cannot be decoded: {reason}.") from error


def _coloured(image: Image.Image, name: str) -> tuple[Image.Image, str]:
    """The image in RGB or grey, and what had to be done for it."""
    from PIL import Image

    mode = image.mode
    if mode in ("RGB", "L"):
        return image, ""
    if mode in _DEEP:
        raise ImageDataError(
            f"{name} has more than 8 bits a pixel (Pillow's mode {mode!r}), which would be lost; scale the images to 8 "
            "bits first."
        )
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        if coloured.getchannel("A").getextrema() == (255, 255):
            return coloured.convert("RGB"), f"{mode}, opaque throughout"
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB"), f"{mode}, transparent, put on white"
    return image.convert("L" if mode == "1" else "RGB"), mode


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 4
        and all(isinstance(side, int) and side >= 0 for side in value)
        and value[0] < value[2]
        and value[1] < value[3]
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
