"""The processes of a run and the devices they hold."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tidar.config import Config, UserError

T = TypeVar("T")


@dataclass
class World:
    """This process's place: `rank` of `size`, its device, the mesh of all devices; whether it prints."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    logs: bool


def join_world(config: Config) -> World:
    """Joins the processes that torchrun started, or forms a world of one where it did not.

    Raises UserError where this machine has fewer GPUs than processes, or a launcher set half of what torchrun sets.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    size = int(os.environ.get("WORLD_SIZE", 1))
    if missing and size > 1:
        raise UserError(f"WORLD_SIZE = {size}, but {', '.join(missing)} are not set: start with torchrun")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        check_device_count(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if missing else {}
    dist.init_process_group(
        # checkpoints exchange their plans over gloo
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=config.comm.init_timeout_seconds),
        device_id=device if device.type == "cuda" else None,
        **alone,
    )
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp_shard",))
    rank = dist.get_rank()
    return World(rank, size, device, mesh, logs=rank in logging_ranks(size))


def logging_ranks(size: int) -> list[int]:
    """The ranks of LOG_RANK, of a world of `size`. Raises UserError where it names others."""
    text = os.environ.get("LOG_RANK") or "0"
    ranks = [part.strip() for part in text.split(",")]
    if not all(rank.isdecimal() and int(rank) < size for rank in ranks):
        raise UserError(f"LOG_RANK = {text}: must be ranks from 0 to {size - 1}, separated by commas")
    return [int(rank) for rank in ranks]


def check_device_count(processes: int) -> None:
    """Raises UserError where this machine has GPUs, but fewer than it is to run processes."""
    if 0 < torch.cuda.device_count() < processes:
        raise UserError(f"NGPU = {processes}: this machine has {torch.cuda.device_count()} GPUs, one for each process")


def rank_zero_first(world: World, action: Callable[[bool], T]) -> T:
    """What `action` returns here. It is told whether this is rank 0, which the others wait for, however long."""
    if world.size == 1:
        return action(True)
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    if world.rank == 0:
        result = action(True)
        dist.barrier(group)
    else:
        try:
            dist.barrier(group)
        except RuntimeError:
            raise UserError("rank 0 has ended before the others could begin; it says why") from None
        result = action(False)
    dist.destroy_process_group(group)
    return result


def shorten_timeout(config: Config, world: World) -> None:
    """Once nothing slow is left to wait for, a rank that hangs is noticed after comm.train_timeout_seconds."""
    # every rank must have left the slow part before the first one loses patience
    dist.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)
    for group in {dist.group.WORLD, world.mesh.get_group()}:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=config.comm.train_timeout_seconds), group)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
