"""The world of processes, and what is done to a model to train it there."""

from tidar.distributed.context_parallel import GatheredAttention, gathered_attention
from tidar.distributed.one_device import OneDevice
from tidar.distributed.parallelize import Sharded, compile_seconds, needs_fsdp, parallelize, reshards_after_forward
from tidar.distributed.peer_copies import GATHER_BUFFERS, REDUCE_BUFFERS, buffer_bytes, exchanged_dtype
from tidar.distributed.precision import compute_dtype, determinism
from tidar.distributed.tensor_parallel import tensor_shard
from tidar.distributed.watchdog import Watchdog
from tidar.distributed.world import (
    World,
    check_device_count,
    check_offload,
    join_world,
    leave_world,
    logging_ranks,
    rank_zero_first,
    resolve_degrees,
    shorten_timeout,
)

__all__ = [
    "GATHER_BUFFERS",
    "REDUCE_BUFFERS",
    "GatheredAttention",
    "OneDevice",
    "Sharded",
    "Watchdog",
    "World",
    "buffer_bytes",
    "check_device_count",
    "check_offload",
    "compile_seconds",
    "compute_dtype",
    "determinism",
    "exchanged_dtype",
    "gathered_attention",
    "join_world",
    "leave_world",
    "logging_ranks",
    "needs_fsdp",
    "parallelize",
    "rank_zero_first",
    "reshards_after_forward",
    "resolve_degrees",
    "shorten_timeout",
    "tensor_shard",
]
