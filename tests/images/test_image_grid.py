"""A grid shows every image in its place, whatever its type and channels."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_earlybird.images import grid_figure, grid_image
from lightning_earlybird.reporting import save_figure


def test_images_stand_row_by_row_on_white() -> None:
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 4)
    grid = grid_image(images, columns=3, gap=1)
    assert grid.shape == (2 * 3 + 1, 3 * 5 + 1, 3)
    assert grid.dtype == torch.uint8
    for index in range(5):
        top, left = 1 + 3 * (index // 3), 1 + 5 * (index % 3)
        assert (grid[top : top + 2, left : left + 4] == index).all()
    assert (grid[4:6, 11:15] == 255).all()
    assert (grid[::3] == 255).all()
    assert (grid[:, ::5] == 255).all()


def test_floats_are_the_range_of_a_diffusion_model() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 2.0, float("nan"), -7.0]).reshape(6, 1, 1, 1)
    assert grid_image(images, gap=0)[0, :, 0].tolist() == [0, 128, 255, 255, 0, 0]
    assert torch.equal(grid_image(images.bfloat16(), gap=0), grid_image(images, gap=0))


def test_bytes_come_back_from_the_range_of_a_model_unchanged() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(grid_image(images.float() / 127.5 - 1), grid_image(images))


def test_grey_images_are_grey_and_few_images_take_one_short_row() -> None:
    images = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    grid = grid_image(images, gap=0)
    assert grid.shape == (4, 8, 3)
    assert torch.equal(grid[..., 0], grid[..., 2])
    assert torch.equal(grid[:, 4:, 1], images[1, 0])


def test_a_grid_is_written_without_matplotlib_and_drawn_with_it(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    grid = grid_image(images, columns=5)
    Image.fromarray(grid.numpy()).save(tmp_path / "grid.png")
    save_figure(grid_figure(images, columns=5, title="20 images"), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width >= 600
        assert figure.height > figure.width * 0.75  # four rows of five, and the title


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (torch.zeros(3, 8, 8), {}, r"images of shape \(3, 8, 8\): expected \(N, C, H, W\)"),
        (torch.zeros(1, 4, 8, 8), {}, r"images of shape \(1, 4, 8, 8\): .* 1 or 3 channels"),
        (torch.zeros(0, 3, 8, 8), {}, r"with at least one image"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.long), {}, r"images of torch\.int64: expected uint8"),
        (torch.zeros(1, 3, 8, 8), {"columns": 0}, "columns=0, gap=2: expected at least 1 column"),
        (torch.zeros(1, 3, 8, 8), {"gap": -1}, "columns=8, gap=-1: .* a gap of at least 0 pixels"),
    ],
)
def test_what_cannot_be_shown_is_refused(images: torch.Tensor, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid_image(images, **settings)
