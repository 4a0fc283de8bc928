"""Any folder of images as a data set in memory."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_custom.datasets import Images
from lightning_custom.errors import ConfigError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What is read, in either case; files of other names are left alone, and so is what begins with a dot."""


def image_folder(data_root: str | None, size: int) -> Images:
    """All images under ``data_root`` as ``[N, C, size, size]``: the largest square in the middle, resized (Lanczos).

    Subfolders that hold images, at any depth, are classes in the order of their names; without any there is one class.
    Images come in an order that is mixed once and for all, so that the first of them are of all classes.
    C is 1 where every image is grey and 3 otherwise. Transparent pixels become black. All are in memory as float32,
    12 KiB an image of 32x32 in colour. :class:`ConfigError` names a file that cannot be read.
    """
    if data_root is None:
        raise ConfigError("data_root: none, but data folder needs one; give --data_root DIR")
    root = Path(data_root)
    if not root.is_dir():
        raise ConfigError(f"data_root: {root} is no folder; give one that holds images")
    files, labels, num_classes = _classes(root)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    files, labels = [files[i] for i in order], [labels[i] for i in order]
    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(partial(_read, size=size), files))
    channels = max(array.shape[2] for array in arrays)
    pixels = np.stack([np.broadcast_to(array, (size, size, channels)) for array in arrays])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Images(images.contiguous(), torch.tensor(labels), num_classes)


def _classes(root: Path) -> tuple[list[Path], list[int], int]:
    """The files in the order of their names, each one's class, and the number of classes."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    classes = [files for files in (_images(folder, "**/*") for folder in folders) if files]
    loose = _images(root, "*")
    if loose and classes:
        raise ConfigError(
            f"data_root: {root} holds images both itself, such as {loose[0].name}, and in folders, such as "
            f"{classes[0][0].relative_to(root)}; move the former into a folder of their own, or elsewhere"
        )
    if not loose and not classes:
        raise ConfigError(f"data_root: {root} holds no images ({', '.join(sorted(SUFFIXES))}); give another folder")
    classes = classes or [loose]
    labels = [label for label, files in enumerate(classes) for _ in files]
    return [file for files in classes for file in files], labels, len(classes)


def _images(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _read(path: Path, size: int) -> np.ndarray:
    """The image in ``path`` as ``[size, size, 1 or 3]`` bytes."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            fitted = ImageOps.fit(_grey_or_colour(image), (size, size), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"data_root: {path} is not a readable image ({error}); mend or remove it") from error
    pixels = np.asarray(fitted)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _grey_or_colour(image: Any) -> Any:
    """An image of mode L or RGB."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, as I before Pillow 11; its own conversion cuts at 255
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("L" if image.mode == "LA" else "RGB")
    return image.convert("RGB")
