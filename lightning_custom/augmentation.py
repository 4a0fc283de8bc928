"""Random changes to training images, drawn for the global batch, so that the number of processes changes nothing."""

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn.functional import pad

from lightning_custom.distributed import take_share


def shift_and_flip(
    fabric: Fabric, images: Tensor, *, shift: int, flip: bool, background: float, generator: torch.Generator
) -> Tensor:
    """This process's images ``[B, C, H, W]``, each moved by up to ``shift`` pixels, half of them mirrored.

    What moves in has the value ``background``. ``generator`` is the step's shared one; every process holds an equal
    part of the batch.
    """
    count, _, height, width = images.shape
    everywhere = (count * fabric.world_size,)
    if shift:
        offsets = torch.randint(0, 2 * shift + 1, (*everywhere, 2), generator=generator)
        down, right = take_share(offsets, fabric).unbind(1)
        rows = down[:, None] + torch.arange(height, device=images.device)
        columns = right[:, None] + torch.arange(width, device=images.device)
        padded = pad(images, (shift,) * 4, value=background)
        each = torch.arange(count, device=images.device)
        images = padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = take_share(torch.rand(everywhere, generator=generator) < 0.5, fabric)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.contiguous()
