"""What a run says about that which makes it slow."""

import random
import re
import statistics

import pytest
from rank_pool import SLOW
from results import read_metrics

from tidar.training.reporting.slowness import REPORTS, slow_ranks

STEPS = 5


def test_a_run_names_the_rank_that_is_slow(tmp_path, ranks, small_model):
    """Rank 1 waits for its data, and a layer of rank 0 takes longer: each is said once, by the rank that logs."""
    options = f"{small_model} --validation.enable false --checkpoint.enable false --training.seq_len 16"
    options += f" --training.local_batch_size 2 --training.steps {STEPS} --metrics.log_freq 1"
    options += f" --job.dump_folder {tmp_path}"
    faults = [(1, step, "data") for step in range(1, STEPS + 1)] + [(0, 1, "layer")]
    printed = ranks.run(2, *options.split(), faults=faults)[0]["printed"]
    (data,) = re.findall(r"slow: rank 1 waits for data (.*) s of a step's (.*) s; the other ranks (.*) s \(", printed)
    (layers,) = re.findall(
        r"slow: the others wait for rank 0, whose layers took ([^ ]*) s in .* ranks' (.*) s", printed
    )
    assert SLOW <= float(data[0]) < float(data[1]) and float(data[2]) < SLOW
    assert SLOW <= float(layers[0]) and float(layers[1]) < SLOW
    assert printed.index(f"step {REPORTS}/") < printed.index("slow: ") < printed.index(f"step {REPORTS + 1}/")
    waits = [line["perf/data_wait_fraction"] for line in read_metrics(tmp_path)]
    assert len(waits) == STEPS and min(waits[1:]) > 0.1  # the slowest rank's, not rank 0's


@pytest.mark.parametrize("seed", range(20))
def test_slow_ranks_are_those_above_the_median_of_the_others(seed):
    rng = random.Random(seed)
    size = rng.randint(2, 6)
    layers = [1 + 0.02 * rng.random() for _ in range(size)]
    assert slow_ranks([0.01] * size, layers, step=3.0) == {}
    slow = rng.randrange(size)
    layers[slow] += 0.2
    data_waits = [0.0] * size
    data_waits[rng.randrange(size)] = 0.5
    found = slow_ranks(data_waits, layers, step=3.0)
    assert set(found) == {("data", data_waits.index(0.5)), ("layers", slow)}
    others = statistics.median(seconds for rank, seconds in enumerate(layers) if rank != slow)
    assert f"took {layers[slow]:.3f} s" in found["layers", slow]
    assert found["layers", slow].endswith(f" {others:.3f} s")


def test_one_device_has_only_its_data_to_wait_for():
    assert slow_ranks([0.01], [1.0], step=1.0) == {}
    assert slow_ranks([0.5], [1.0], step=1.0) == {
        ("data", 0): "slow: waits for data 0.500 s of a step's 1.000 s (raise data.num_workers)"
    }
