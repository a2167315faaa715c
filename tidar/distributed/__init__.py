"""The world of processes, and what is done to a model to train it there."""

from tidar.distributed.parallelize import parallelize
from tidar.distributed.precision import arithmetic_dtype, make_deterministic
from tidar.distributed.world import (
    World,
    check_device_count,
    join_world,
    leave_world,
    logging_ranks,
    rank_zero_first,
    shorten_timeout,
)

__all__ = [
    "World",
    "arithmetic_dtype",
    "check_device_count",
    "join_world",
    "leave_world",
    "logging_ranks",
    "make_deterministic",
    "parallelize",
    "rank_zero_first",
    "shorten_timeout",
]
