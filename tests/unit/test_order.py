"""Which sample is seen when, on any number of ranks, before and after a restart."""

import json
import random
import shutil

from small_models import make_model


def test_other_ranks_resume_with_the_same_samples(tmp_path, ranks, uneven_data):
    """Saved at a random step on 1, 2 and 3 ranks, continued on two of 1 to 4 each, with other micro-batches, over an
    epoch's end: all samples of all steps are those of the run that was not interrupted, in its order.
    """
    rng = random.Random(0)
    make_model("qwen3", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    steps, batch = 8, 36
    common = f"{uneven_data} --training.seq_len 64 --training.global_batch_size {batch}"
    common += f" --model.hf_path {tmp_path / 'model'} --metrics.log_freq 1 --validation.enable false"

    def seen(folder, size: int, until: int) -> list[int]:
        local = rng.choice([n for n in (6, 9, 12, 18) if batch % (n * size) == 0])
        options = f"--job.dump_folder {folder} --training.local_batch_size {local} --training.steps {until}"
        batches = [rank["rows"] for rank in ranks.run(size, *common.split(), *options.split())]
        return [row for micro_batch in zip(*batches, strict=True) for rows in micro_batch for row in rows]

    expected = seen(tmp_path / "whole", 1, steps)
    assert len(expected) == steps * batch
    n_rows = max(expected) + 1
    assert n_rows < len(expected)  # an epoch ends in between
    assert sorted(expected[:n_rows]) == list(range(n_rows))
    for size in (1, 2, 3):
        saved_at = rng.randint(1, steps - 1)
        assert seen(tmp_path / f"{size}", size, saved_at) == expected[: saved_at * batch]
        for others in rng.sample((1, 2, 3, 4), 2) if size < 3 else (1, 4):
            folder = tmp_path / f"{size}-{others}"
            shutil.copytree(tmp_path / f"{size}", folder)
            assert seen(folder, others, steps) == expected[saved_at * batch :]
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines if "batch_loss" in line] == list(range(1, steps + 1))
