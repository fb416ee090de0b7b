"""Crops, sizes and colours: hand-made images whose every pixel says where it was."""

import functools
from collections.abc import Callable
from pathlib import Path

import image_files as files
import numpy as np
import pytest
from PIL import Image

from lightning_earlybird.images import ImageDataError, ImageSet, read_images
from lightning_earlybird.images.preparation import Preparation


def places(height: int, width: int) -> np.ndarray:
    """Red counts rows, green columns."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(x)], axis=-1).astype(np.uint8)


def prepared(pixels: np.ndarray, **settings: object) -> np.ndarray:
    """Through an image file, and by the pixels: both the same."""
    preparation = Preparation(**({"size": None, "crop": None, "channels": "RGB"} | settings))  # type: ignore[arg-type]
    from_file, _ = preparation.apply(files.encoded(pixels, "png"), "image")
    from_pixels, _ = preparation.apply(pixels, "image")
    assert np.array_equal(from_file, from_pixels)
    assert from_file.dtype == np.uint8
    return from_file


def test_nothing_is_done_that_was_not_asked_for() -> None:
    assert np.array_equal(prepared(places(6, 9)), places(6, 9).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("crop", "rows", "columns"),
    [(4, (1, 5), (2, 6)), (6, (0, 6), (1, 7)), ((1, 2, 8, 5), (2, 5), (1, 8)), ((0, 0, 9, 6), (0, 6), (0, 9))],
)
def test_a_crop_is_centred_or_where_its_box_says(crop: object, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    expected = places(6, 9)[slice(*rows), slice(*columns)]
    assert np.array_equal(prepared(places(6, 9), crop=crop), expected.transpose(2, 0, 1))


def test_the_crop_of_celeba_is_that_of_the_ddim_experiments() -> None:
    # Rows 121 - 64 to 121 + 64, columns 89 - 64 to 89 + 64.
    expected = places(218, 178)[57:185, 25:153]
    assert np.array_equal(prepared(places(218, 178), crop="celeba"), expected.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("shape", "size", "rows", "columns"),
    [((6, 9), (6, 6), (0, 6), (1, 7)), ((9, 6), (6, 6), (1, 7), (0, 6)), ((8, 12), (4, 8), (1, 7), (0, 12))],
)
def test_the_largest_centred_part_of_the_proportions_is_scaled(
    shape: tuple[int, int], size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    part = Image.fromarray(places(*shape)[slice(*rows), slice(*columns)])
    expected = np.asarray(part.resize((size[1], size[0]), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(prepared(places(*shape), size=size), expected)


def test_what_lies_outside_of_a_crop_does_not_show() -> None:
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[8:24, 8:24] = 0
    assert prepared(pixels, crop=16, size=(4, 4)).max() == 0


def test_images_too_small_for_a_crop_are_refused() -> None:
    with pytest.raises(ImageDataError, match=r"image is 9 x 6 pixels large, too small for crop=7"):
        prepared(places(6, 9), crop=7)
    with pytest.raises(ImageDataError, match=r"too small for crop=\(0, 0, 10, 6\)"):
        prepared(places(6, 9), crop=(0, 0, 10, 6))
    with pytest.raises(
        ImageDataError, match=r"image is 9 x 6 .* crop='celeba' is meant for the aligned images of 178 x"
    ):
        prepared(places(6, 9), crop="celeba")


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ImageSet]:
    return functools.partial(read_images, cache_dir=tmp_path / "cache", progress=False)


def write(path: Path, image: Image.Image, **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)
    return path.parent


GREY = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
COLOUR = Image.fromarray(files.pictures(1, 8, 8)[0])
SEE_THROUGH = np.concatenate([np.asarray(COLOUR), np.full((8, 8, 1), 128, np.uint8)], axis=-1)
HALF_WHITE = np.asarray(Image.alpha_composite(Image.new("RGBA", (8, 8), "white"), Image.fromarray(SEE_THROUGH)))[
    ..., :3
]

MODES = {
    "grey": (GREY, "png", np.asarray(GREY.convert("RGB")), "L"),
    "opaque": (COLOUR.convert("RGBA"), "png", np.asarray(COLOUR), "RGBA, opaque throughout"),
    "transparent": (Image.fromarray(SEE_THROUGH), "png", HALF_WHITE, "RGBA, transparent, put on white"),
    "grey and opaque": (GREY.convert("LA"), "png", np.asarray(GREY.convert("RGB")), "LA, opaque throughout"),
    "palette": (COLOUR.quantize(16), "png", np.asarray(COLOUR.quantize(16).convert("RGB")), "P"),
    "black and white": (GREY.convert("1"), "png", np.asarray(GREY.convert("1").convert("RGB")), "1"),
    "print": (COLOUR.convert("CMYK"), "tiff", np.asarray(COLOUR.convert("CMYK").convert("RGB")), "CMYK"),
}


@pytest.mark.parametrize(("image", "kind", "expected", "mode"), MODES.values(), ids=MODES)
def test_other_modes_are_converted_and_counted(
    read: Callable[..., ImageSet], tmp_path: Path, image: Image.Image, kind: str, expected: np.ndarray, mode: str
) -> None:
    folder = write(tmp_path / "data" / f"a.{kind}", image)
    write(folder / "b.png", COLOUR)
    images = read(folder)
    assert np.array_equal(images.images[0].permute(1, 2, 0).numpy(), expected)
    assert images.notes == (f"1 images were converted to RGB (mode {mode}).",)
    # What was noted is in the cache, too.
    assert read(folder).notes == images.notes


def test_grey_images_stay_grey_where_grey_is_wanted(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    folder = write(tmp_path / "data" / "a.png", GREY)
    write(folder / "b.png", COLOUR)
    images = read(folder, channels="L")
    assert images.images.shape == (2, 1, 8, 8)
    assert np.array_equal(images.images[0, 0].numpy(), np.asarray(GREY))
    assert np.array_equal(images.images[1, 0].numpy(), np.asarray(COLOUR.convert("L")))
    assert images.notes == ()


def test_a_palette_with_a_transparent_colour_is_put_on_white(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    images = read(write(tmp_path / "data" / "a.png", palette, transparency=0))
    assert images.images[0, :, 0, 0].tolist() == [255, 255, 255]
    assert images.images[0, :, 0, 1].tolist() == [0, 0, 255]


def test_photographs_stand_upright(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    upright = Image.fromarray(files.pictures(1, 16, 8)[0])
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    images = read(write(tmp_path / "data" / "a.png", lying, exif=exif))
    assert np.array_equal(images.images[0].permute(1, 2, 0).numpy(), np.asarray(upright))
