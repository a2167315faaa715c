"""Ranks that share each layer train as one does, beside ranks that share rows or have rows of their own."""

import shutil
from pathlib import Path

import pytest
import torch
from results import read_metrics, read_weights
from small_models import make_model

from tidar.models import from_pretrained

ROWS, STEPS = 8, 4
COMMON = f"""
    --checkpoint.interval 2 --checkpoint.keep_latest_k 0 --training.seq_len 16 --tidar.block_size 3
    --metrics.log_freq 1 --training.global_batch_size {ROWS} --training.steps {STEPS} --validation.share 0.03
    --validation.freq 4
""".split()
TP = "--parallelism.tensor_parallel_degree 2"
CP = "--parallelism.context_parallel_degree 2"
DECODE = "--validation.generate_prompts 3"
# name: ranks, those with rows of their own, micro-batches, the run whose second step it resumes from, options
CUTS = {
    "1": (1, 1, 1, "", DECODE),
    "tp 2": (2, 1, 1, "", f"{TP} {DECODE}"),
    "dp 2 from tp 2": (2, 2, 1, "tp 2", ""),
    "tp 2 x dp 2 from 1": (4, 2, 2, "1", f"{TP} --activation_checkpoint.mode full"),
    "tp 2 x cp 2 from tp 2 x dp 2": (
        *(4, 1, 2, "tp 2 x dp 2 from 1"),
        f"{TP} {CP} --parallelism.gradient_reduction step --activation_checkpoint.mode selective",
    ),
}
MORE = {
    "tp 2 x dp 2": (4, 2, 2, "", TP),
    "tp 2 x replicas 2": (4, 2, 1, "", f"{TP} --parallelism.data_parallel_replicate_degree 2"),
    "tp 2 x cp 2": (4, 1, 2, "", f"{TP} {CP} {DECODE}"),
    "tp 2 from tp 2 x cp 2": (2, 1, 1, "tp 2 x cp 2", f"{TP} --parallelism.fsdp_reshard_after_forward always"),
}


@pytest.mark.parametrize("cuts", [CUTS, pytest.param(CUTS | MORE, marks=pytest.mark.long)], ids=["some", "all"])
def test_same_numbers_however_layers_are_divided(tmp_path, ranks, small_model, cuts):
    """Packed rows of very different documents, in float32, against one process; and resumed on other ranks."""
    print("\n   loss    norm weights")
    for name, (size, dp_size, micro_batches, before, options) in cuts.items():
        folder, weights = tmp_path / name, tmp_path / "weights.pt"
        extra = f"--training.local_batch_size {ROWS // dp_size // micro_batches} {options}"
        if before:
            shutil.copytree(tmp_path / before, folder)
            shutil.rmtree(folder / "checkpoint" / f"step-{STEPS}")
        answers = ranks.run(
            size, *COMMON, *small_model.split(), *extra.split(), "--job.dump_folder", str(folder), weights=weights
        )
        assert [answer["error"] for answer in answers] == [None] * size
        assert not before or "resumed from step 2" in answers[0]["printed"]
        found = curves(folder), curves(folder, "train/grad_norm"), read_weights(weights)
        if name == "1":
            expected = found
        errors = [
            max(abs(a - b) / abs(b or 1) for a, b in zip(*pair, strict=True)) for pair in zip(found[:2], expected)
        ]
        errors.append(((found[2] - expected[2]).norm() / expected[2].norm()).item())
        print(" ".join(f"{error:7.1e}" for error in errors), name)
        assert max(errors[:2]) < 1e-5 and errors[2] < 1e-4, name
        if DECODE in options:
            assert "decoded 3 prompts" in answers[0]["printed"]
        # what other commands read: fused tensors, and divided columns, are whole again
        trained = torch.load(weights, weights_only=True)
        saved = from_pretrained(str(folder / "checkpoint" / f"step-{STEPS}")).state_dict()
        assert all(saved[key].equal(tensor) for key, tensor in trained.items())


def curves(folder: Path, *keys: str) -> list[float]:
    """Of training, step by step, and of validation; by default of all losses and accuracies."""
    keys = keys or (
        *(f"train/batch_{name}" for name in ("loss", "ar_loss", "diffusion_loss", "accuracy")),
        *("val/loss", "val/diffusion_loss_at/0", "val/accepted_prefix"),
    )
    return [line[key] for line in read_metrics(folder) for key in keys if key in line]


def test_tied_embeddings_biases_and_exports(tmp_path, ranks, uneven_data):
    """Qwen2, with moments in bfloat16 whose rounding does not depend on the ranks, for an epoch."""
    make_model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "qwen2")
    options = f"{uneven_data} --model.hf_path {tmp_path / 'qwen2'} --training.seq_len 128 --training.steps 4"
    options += " --metrics.log_freq 1 --checkpoint.export_epochs 1 --optimizer.state_dtype bfloat16"
    found = []
    for size, extra in ((1, ""), (2, TP)):
        folder, weights = tmp_path / str(size), tmp_path / f"{size}.pt"
        extra = f"--training.local_batch_size 32 --job.dump_folder {folder} {extra}"
        ranks.run(size, *options.split(), *extra.split(), weights=weights)
        found.append((curves(folder), curves(folder, "train/grad_norm"), read_weights(weights)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and len(found[0][0]) > 10
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert (found[1][2] - found[0][2]).norm() < 1e-6 * found[0][2].norm()
    exports = [from_pretrained(str(tmp_path / run / "export" / "epoch_1")).state_dict() for run in "12"]
    assert all((tensor - exports[1][name]).norm() < 1e-3 * tensor.norm() for name, tensor in exports[0].items())
