"""Exports of the model during training."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tidar.config import UserError
from tidar.models import Decoder
from tidar.models.huggingface import published_ranges, published_shapes, write_huggingface_folder
from tidar.training.checkpoint.retention import remove_tree
from tidar.training.reporting.metrics import validation_figures


def export_parameters(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    model: Decoder,
    step: int,
    write_assets: Callable[[Path], None],
    writes: bool,
    before_each: Callable[[], None],
) -> None:
    """Writes a model's parameters, sharded or not, to a Hugging Face folder in bfloat16. All ranks call it; one writes.

    folder: export/<name> of the run's folder. step: of the run.
    before_each: called by all ranks before each parameter; what it raises interrupts the export.
    Replaces what an earlier attempt has left of the folder. Raises UserError where it cannot be written.
    """

    # the published tensors of a fused parameter follow each other, so it is gathered once
    @lru_cache(maxsize=1)
    def gather(name: str) -> torch.Tensor:
        before_each()
        narrow = parameters[name].detach().to(torch.bfloat16)
        part = narrow.full_tensor() if isinstance(narrow, DTensor) else narrow
        return model.shard.whole(name, part).cpu()

    if not writes:
        for name in parameters:
            gather(name)
        return
    for old in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):
        remove_tree(old)
    figures = validation_figures(folder.parents[1], step)
    shapes = {name: model.shard.whole_shape(name, parameter.shape) for name, parameter in parameters.items()}
    parts = published_ranges(shapes, model.config)

    def read(name: str) -> Iterator[torch.Tensor]:
        for parameter, rows in parts[name]:
            yield gather(parameter)[rows.at : rows.at + rows.length]

    try:
        write_huggingface_folder(
            folder,
            published_shapes(shapes, model.config),
            torch.bfloat16,
            read,
            write_assets,
            step=step,
            figures=figures,
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
