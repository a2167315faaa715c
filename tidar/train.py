"""Trains a TiDAR model: python -m tidar.train --job.config_file FILE [--section.option value ...]"""

import sys
import time

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from tidar.config import UserError, load_config, user_errors_exit
from tidar.distributed import leave_world
from tidar.training.reporting.metrics import format_duration
from tidar.training.trainer import Trainer


@record
def main() -> None:
    started = time.perf_counter()
    with user_errors_exit():
        try:
            trainer = Trainer(load_config(sys.argv[1:]))
            trainer.train()
            trainer.log(f"done in {format_duration(time.perf_counter() - started)}")
        except UserError:
            leave_world()
            raise
        except torch.OutOfMemoryError as error:
            # on any rank: the others may have enough memory
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
    # not after other errors: it would wait for ranks that still compute, before the error is printed
    leave_world()


if __name__ == "__main__":
    main()
