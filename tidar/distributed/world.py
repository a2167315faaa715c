"""The processes of a run and the devices they hold."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tidar.config import Config, UserError


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

    Raises UserError where this machine has fewer GPUs than processes.
    """
    local_rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        check_device_count(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        # checkpoints exchange their plans over gloo
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=config.comm.init_timeout_seconds),
        device_id=device if device.type == "cuda" else None,
        **alone,
    )
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp_shard",))
    rank = dist.get_rank()
    logging_ranks = os.environ.get("LOG_RANK", "0").replace(" ", "").split(",")
    return World(rank, size, device, mesh, logs=str(rank) in logging_ranks)


def check_device_count(processes: int) -> None:
    """Raises UserError where this machine has GPUs, but fewer than it is to run processes."""
    if 0 < torch.cuda.device_count() < processes:
        raise UserError(f"NGPU = {processes}: this machine has {torch.cuda.device_count()} GPUs, one for each process")


def shorten_timeout(config: Config, world: World) -> None:
    """Once nothing slow is left to wait for, a rank that hangs is noticed after comm.train_timeout_seconds."""
    # every rank must have left the slow part before the first one loses patience
    dist.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)
    for group in {dist.group.WORLD, world.mesh.get_group()}:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=config.comm.train_timeout_seconds), group)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
