"""Pictures in files, as a model takes them: encoded, or as arrays of its size."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np
from PIL import ExifTags, Image, ImageOps


def encoded(path: Path) -> bytes:
    """The bytes of a file; of WebP, which no signature decodes, and of what a camera says is turned, an upright PNG."""
    with _opened(path) as (image, upright):
        if image.format != "WEBP" and upright is image:
            return path.read_bytes()
        content = io.BytesIO()
        upright.convert("RGB").save(content, "PNG")
        return content.getvalue()


def takes_picture(sizes: Sequence[int] | None) -> TypeGuard[Sequence[int]]:
    """Whether an input of these sizes, -1 for any, takes a batch of pictures of grey or of three colours."""
    return (
        sizes is not None and len(sizes) in (3, 4) and (len(sizes) == 3 or sizes[3] in (1, 3)) and 0 not in sizes[1:3]
    )


def as_batch(path: Path, sizes: Sequence[int]) -> np.ndarray:
    """One picture for an input of these sizes, uint8."""
    with _opened(path) as (_, upright):
        image = upright.convert("RGB" if sizes[3:] == [3] else "L")
        # As a signature `image_bytes` does it: linearly, and with smoothing where it gets smaller.
        height, width = _size(sizes[1], sizes[2], image)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return pixels.reshape(1, height, width, *sizes[3:])


def _size(height: int, width: int, image: Image.Image) -> tuple[int, int]:
    """The sizes a model asks for; where it takes any (-1), those of the picture, or as its proportions want it."""
    if height < 0 and width < 0:
        return image.height, image.width
    if height < 0:
        return max(1, round(image.height * width / image.width)), width
    if width < 0:
        return height, max(1, round(image.width * height / image.height))
    return height, width


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Image.Image, Image.Image]]:
    """The picture in a file; and the same, or where its EXIF data says that it is turned, another that is upright."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            yield image, ImageOps.exif_transpose(image) if turned else image
    except Exception as error:  # Each of pillow's readers has its own.
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
