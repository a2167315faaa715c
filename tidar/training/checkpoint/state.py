"""The tensors of a checkpoint by name: model.*, optimizer.*, progress.* and random.*."""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tidar.distributed import World
from tidar.models import TensorShard, local_blocks
from tidar.training.optim.gradients import local_part
from tidar.training.optim.optimizer import state_tensors


class Blocks:
    """A tensor of which this rank has some blocks, as tensor parallelism divides it; DCP saves and loads each of them.

    So a checkpoint holds whole tensors, for any number of ranks. local: the memory of this rank's blocks.
    """

    def __init__(self, shard: TensorShard, name: str, tensor: Tensor):
        """tensor: this rank's part of the parameter `name`, or of what belongs to it, sharded or not."""
        self.local, blocks = local_blocks(shard, name, tensor)
        self.shape, self.dtype = torch.Size(shard.whole_shape(name, tensor.shape)), tensor.dtype
        columns = self.local.shape[1:]
        self.chunks = [
            ChunkStorageMetadata(
                torch.Size([block.row, block.column][: len(self.shape)]), torch.Size([block.length, *columns])
            )
            for block in blocks
        ]
        self.rows: dict[Any, slice] = {
            chunk.offsets: slice(block.at, block.at + block.length) for chunk, block in zip(self.chunks, blocks)
        }

    def size(self) -> torch.Size:
        return self.shape

    # what DCP asks of what it saves

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.chunks


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Loads into Blocks, too. The state is flat, and nothing in it is on the meta device."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.flatten_state_dict = False

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found: Any = self.state_dict[index.fqn]
        return found.local[found.rows[index.offset]] if isinstance(found, Blocks) else super().lookup_tensor(index)


def training_state(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Tensor],
    shard: TensorShard,
) -> dict[str, Tensor | Blocks]:
    """The tensors that a run saves, and that a checkpoint is loaded into; sharded as they are.

    shard: the part of the parameters that this rank has.
    """
    state: dict[str, Tensor | Blocks] = {f"progress.{name}": tensor for name, tensor in progress.items()}
    owned = [("model", name, name, parameter.detach()) for name, parameter in parameters.items()]
    for name, tensor in state_tensors(parameters, optimizer).items():
        owned.append(("optimizer", name, name.rpartition(".")[0], tensor))
    for kind, name, parameter, tensor in owned:
        is_divided = tensor.ndim and shard.is_divided(parameter)
        state[f"{kind}.{name}"] = Blocks(shard, parameter, tensor) if is_divided else tensor
    return state


def local(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's shards of a state."""
    return {
        name: tensor.local if isinstance(tensor, Blocks) else local_part(tensor) for name, tensor in tensors.items()
    }


def random_state(world: World) -> dict[str, Tensor]:
    """The state of this rank's random generators. The names say for how many ranks it is meaningful."""
    name = f"random.world_size_{world.size}.rank_{world.rank}"
    state = {f"{name}.cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state[f"{name}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Sets the generators that `random_state` has read."""
    for name, tensor in state.items():
        (torch.cuda.set_rng_state if name.endswith(".cuda") else torch.set_rng_state)(tensor)
