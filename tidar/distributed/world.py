"""The processes of a run and the devices they hold."""

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tidar.config import Config, UserError

T = TypeVar("T")

# seconds that collectives wait longer than the watchdog, which can name the rank that they wait for. Copies between
# GPUs (peer_copies) have no timeout: only the watchdog ends a run whose ranks wait there
BACKSTOP = 30

# worlds that this process has joined, by the address of their store
_joined: Counter[str] = Counter()


@dataclass
class World:
    """This process: `rank` of `size`, its device, and whether it logs to the console.

    The dimensions of all ranks are, outermost first, replicas of the state, its shards, context and tensor parallelism.
    tp_group: the ranks of tensor parallelism, which share each layer. cp_group: those of context parallelism, which
    share the rows of a batch, and have the same part of each layer. mesh: the ranks with the same part of each layer,
    over "dp_shard" and, where the state has replicas, "dp_replicate" before it. shard_group: the ranks of this mesh
    that share one replica. loss_group: all ranks of this mesh; each target is on exactly one of them.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    shard_group: dist.ProcessGroup
    loss_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    cp_size: int
    tp_size: int
    logs: bool

    @property
    def tp_rank(self) -> int:
        """Index of this rank among those that divide its layers."""
        return self.rank % self.tp_size

    @property
    def cp_rank(self) -> int:
        """Index of this rank among those that divide its rows."""
        return self.rank // self.tp_size % self.cp_size

    @property
    def dp_rank(self) -> int:
        """Index of the batches that this rank takes, below `dp_size`."""
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def dp_size(self) -> int:
        return self.size // (self.tp_size * self.cp_size)


def join_world(config: Config) -> World:
    """Joins the processes that torchrun has started. Without torchrun this process is a world of its own.

    Raises UserError where this machine has fewer GPUs than processes, where only some of torchrun's variables are set,
    or where the options do not fit the number of processes.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    size = _variable("WORLD_SIZE", default=1)
    given = [f"{name} = {_variable(name, default=0)}" for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if missing and given and given != ["WORLD_SIZE = 1"]:
        raise UserError(f"{', '.join(given)}, but {', '.join(missing)} are not set: start with torchrun")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if missing and tasks != "1":
        raise UserError(
            f"SLURM_STEP_NUM_TASKS = {tasks}: srun has started each of these as a separate run",
            "let it start ./run_train.sh once on each node, which starts a process for each GPU (docs/launching.md)",
        )
    replicas, shards = resolve_degrees(config, size)
    local_rank = _variable("LOCAL_RANK", default=0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        check_device_count(_variable("LOCAL_WORLD_SIZE", default=1))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    check_offload(config, device)
    timeout = timedelta(seconds=config.comm.init_timeout_seconds + BACKSTOP)
    store, rank, size = (dist.HashStore(), 0, 1) if missing else _rendezvous(timeout)
    # a bound device lets NCCL split groups off the first one; torch 2.11 crashes there in a process's second world.
    # All ranks bind theirs or none does
    if rank == 0:
        store.set("binds-device", str(int(sum(_joined.values()) < 2)))
    binds_device = device.type == "cuda" and store.get("binds-device") == b"1"
    dist.init_process_group(
        # checkpoints exchange their plans over gloo
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        device_id=device if binds_device else None,
        store=store,
        rank=rank,
        world_size=size,
    )
    # parameters are sharded over the ranks of context parallelism, too
    cp_size, tp_size = config.parallelism.context_parallel_degree, config.parallelism.tensor_parallel_degree
    shards *= cp_size
    sizes = {"dp_replicate": replicas, "dp_shard": shards, "tp": tp_size}
    sizes = {name: degree for name, degree in sizes.items() if degree > 1 or name == "dp_shard"}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    groups = {"dp": size // (cp_size * tp_size), "cp": cp_size, "tp": tp_size}
    rows = init_device_mesh(device.type, tuple(groups.values()), mesh_dim_names=tuple(groups))
    loss_group: Any = dist.group.WORLD
    if tp_size > 1:
        parts = init_device_mesh(device.type, (size // tp_size, tp_size), mesh_dim_names=("part", "tp"))
        loss_group = parts.get_group("part")
    if device.type == "cuda" and not binds_device:
        # what a bound device has done by now: a communicator that is made later would wait for kernels that wait for it
        for group in dict.fromkeys([loss_group, *mesh.get_all_groups(), *rows.get_all_groups()]):
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    return World(
        rank=rank,
        size=size,
        device=device,
        mesh=mesh[tuple(name for name in sizes if name != "tp")],
        shard_group=mesh.get_group("dp_shard"),
        loss_group=loss_group,
        cp_group=rows.get_group("cp"),
        tp_group=rows.get_group("tp"),
        cp_size=cp_size,
        tp_size=tp_size,
        logs=rank in logging_ranks(size),
    )


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} = {text}: must be integer >= 0; torchrun sets it")
    return int(text)


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of all processes, this one's rank, and how many there are."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # torchrun keeps the store, too, when a process leaves one world and joins the next
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    _joined[address] += 1
    store = dist.PrefixStore(f"world-{_joined[address]}", store)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps the store when it restarts the processes, with the addresses of those that have died
        # (pytorch/pytorch#135712). On several nodes the agents may count restarts differently
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store, rank, size


def resolve_degrees(config: Config, world_size: int) -> tuple[int, int]:
    """Degrees of data parallelism: replicas of the state, and ranks that shard each. With the degrees of context
    parallelism, over whose ranks parameters are sharded too, and of tensor parallelism, their product must be the
    number of devices.

    Raises UserError where it is not.
    """
    options, devices = config.parallelism, world_size
    others = {name: getattr(options, name) for name in ("context_parallel_degree", "tensor_parallel_degree")}
    others = {name: degree for name, degree in others.items() if degree > 1}
    product = math.prod(others.values())
    if devices % product:
        names = " x ".join(f"parallelism.{name} = {degree}" for name, degree in others.items())
        raise UserError(f"{names}: must divide the number of devices, {devices}")
    world_size //= product
    replicas, shards = options.data_parallel_replicate_degree, options.data_parallel_shard_degree
    if replicas == shards == -1:
        raise UserError(
            "parallelism.data_parallel_replicate_degree = parallelism.data_parallel_shard_degree = -1: "
            "only one of them can be left to be computed from the other"
        )
    if replicas == -1:
        replicas = world_size // shards
    if shards == -1:
        shards = world_size // replicas
    if replicas * shards != world_size:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree = {options.data_parallel_replicate_degree}, "
            f"data_parallel_shard_degree = {options.data_parallel_shard_degree}: "
            f"their product must be the number of devices, {devices}"
            + "".join(f", divided by {name} = {degree}" for name, degree in others.items())
        )
    return replicas, shards


def logging_ranks(size: int) -> list[int]:
    """The ranks that LOG_RANK names. Raises UserError where they are not below `size`."""
    text = os.environ.get("LOG_RANK") or "0"
    ranks = [part.strip() for part in text.split(",")]
    if not all(rank.isdecimal() and int(rank) < size for rank in ranks):
        raise UserError(f"LOG_RANK = {text}: must be ranks from 0 to {size - 1}, separated by commas")
    return [int(rank) for rank in ranks]


def check_offload(config: Config, device: torch.device) -> None:
    """Raises UserError where training.enable_cpu_offload has nothing to offload from."""
    if config.training.enable_cpu_offload and device.type != "cuda":
        raise UserError("training.enable_cpu_offload = true: needs CUDA; without it all is in the host's memory anyway")


def check_device_count(processes: int) -> None:
    """Raises UserError where this machine has GPUs, but fewer than it is to run processes."""
    if 0 < torch.cuda.device_count() < processes:
        raise UserError(f"NGPU = {processes}: this machine has {torch.cuda.device_count()} GPUs, one for each process")


def rank_zero_first(world: World, action: Callable[[bool], T]) -> T:
    """Calls `action(is_rank_zero)` on rank 0, then on the other ranks, which wait however long it takes. Returns what
    it returns on this rank.
    """
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
            raise UserError("rank 0 has ended before the others could start; see its error") from None
        result = action(False)
    dist.destroy_process_group(group)
    return result


def shorten_timeout(config: Config, world: World) -> None:
    """Lowers the timeout of collectives to comm.train_timeout_seconds and BACKSTOP. All ranks call it."""
    # every rank must have left the slow part before the first one can time out
    dist.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)
    groups = {world.loss_group, world.cp_group, world.tp_group, *world.mesh.get_all_groups()}
    for group in {dist.group.WORLD, *groups}:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=config.comm.train_timeout_seconds + BACKSTOP), group)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
