"""Images of folders, archives and the Hugging Face hub, decoded once and mapped into memory."""

from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.grid import grid_figure, grid_image
from lightning_earlybird.images.image_set import ImageSet
from lightning_earlybird.images.reading import read_images

__all__ = ["ImageDataError", "ImageSet", "grid_figure", "grid_image", "read_images"]
