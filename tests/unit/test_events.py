"""What TensorBoard reads of a run that was interrupted, whatever its clock did."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from tidar.training.reporting import events
from tidar.training.reporting.metrics import MetricWriter


@pytest.mark.parametrize("clocks", [(1.7e9, 1.8e9, 1.9e9), (1.9e9, 1.6e9, 1.7e9), (1.9e9, 1.9e9, 1.9e9)])
def test_the_newest_start_counts(tmp_path, monkeypatch, clocks):
    expected = {}
    for start, (clock, first_step) in enumerate(zip(clocks, (1, 4, 3))):
        monkeypatch.setattr(events.time, "time", lambda clock=clock: clock)
        writer = MetricWriter(tmp_path, enabled=True, log=print)
        expected = {step: value for step, value in expected.items() if step < first_step}
        with writer.opened(first_step, validates_again=False):
            for step in range(first_step, first_step + 4):
                writer.write(step, {"train/lr": start + step / 8, "train/grad_norm": float("nan")})
                expected[step] = start + step / 8
    monkeypatch.undo()
    reader = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in reader.Scalars("train/lr")] == list(expected.items())
    assert len(reader.Scalars("train/grad_norm")) == len(expected)
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert [event.value for event in runs.Scalars("tb", "train/lr")] == list(expected.values())


def test_a_file_that_tensorboard_watches_is_followed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(events.time, "time", lambda: 1.9e9)
    first = events.EventFile(tmp_path, 1)
    first.write(1, {"a": 1.0})
    reader = EventAccumulator(str(tmp_path)).Reload()
    monkeypatch.setattr(events.time, "time", lambda: 1.6e9)
    second = events.EventFile(tmp_path, 1)
    second.write(1, {"a": 2.0})
    assert [event.value for event in reader.Reload().Scalars("a")] == [2.0]
