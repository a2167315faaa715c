"""The trainer's arithmetic, done again in plain loops and float64: rows one by one, whole logits, AdamW written out."""

import itertools

import pytest
import torch
import uneven  # noqa: F401  (registers the source)
from reference import tidar_mask, tidar_targets
from results import read_metrics, whole
from runs import train_run

from tidar.data import TrainingOrder
from tidar.models import Decoder, initialize, size_config
from tidar.models.huggingface import decoder_config

SEQ_LEN, BLOCK, STEPS = 48, 3, 2
OPTIONS = f"""
    --data.source uneven --validation.share 0.17 --data.num_workers 0
    --training.seq_len {SEQ_LEN} --tidar.block_size {BLOCK}
    --tidar.ar_loss_weight 1.5 --tidar.diffusion_loss_weight 0.5 --training.local_batch_size 2
    --training.global_batch_size 6 --training.steps {STEPS} --training.max_norm 0.3 --training.loss_chunk_size 17
    --optimizer.lr 1e-2 --optimizer.beta1 0.8 --optimizer.beta2 0.9 --optimizer.eps 1e-3 --optimizer.weight_decay 0.2
    --lr_scheduler.warmup_steps 0 --lr_scheduler.decay_type constant --metrics.log_freq 1 --checkpoint.enable false
""".split()


def score_row(model: Decoder, row) -> dict[str, list[tuple]]:
    """(place in the block, weight, nll, right, position in the row) of the row's targets, by loss."""
    tokens, ids, loss_mask = row
    lengths = [len(list(run)) for _, run in itertools.groupby(ids.tolist())]
    mask = tidar_mask(lengths, BLOCK)[None, None]
    places = torch.tensor([place for length in lengths for place in range(length)])
    inputs = torch.cat([tokens, torch.full_like(tokens, 257)])
    log_probabilities = model(inputs[None], places.repeat(2)[None], mask)[0].log_softmax(dim=-1)
    scores = {}
    for loss, targets in zip(("ar", "diffusion"), tidar_targets(tokens, lengths, loss_mask, BLOCK)):
        scores[loss] = [
            (place, weight, -log_probabilities[at, label], log_probabilities[at].argmax() == label, at - SEQ_LEN)
            for at, label, weight, place in targets
        ]
    return scores


def adamw(parameters, gradients, moments, step: int) -> None:
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        gradient = gradient * min(1, 0.3 / (norm + 1e-6))
        first, second = moments.get(i, (0, 0))
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        moments[i] = first, second
        if parameter.ndim == 2:
            parameter *= 1 - 1e-2 * 0.2
        parameter -= 1e-2 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)


def test_two_steps_and_a_validation_by_hand(tmp_path, smaller_debug):
    trainer = train_run([*OPTIONS, "--job.dump_folder", str(tmp_path)])
    *reported, validation = read_metrics(tmp_path)

    model = Decoder(decoder_config(size_config("debug") | {"vocab_size": 258}))
    initialize(model, seed=0)
    model.double()
    order = iter(TrainingOrder(len(trainer.batches.training_rows), 0, 0, 1, 0, 1))
    moments = {}
    for step in range(1, STEPS + 1):
        scores = [score_row(model, trainer.batches.training_rows[row]) for ((_, row),) in itertools.islice(order, 6)]
        means = {}
        for loss in ("ar", "diffusion"):
            targets = [target for row in scores for target in row[loss]]
            means[loss] = sum(weight * nll for _, weight, nll, *_ in targets) / sum(target[1] for target in targets)
        total = (1.5 * means["ar"] + 0.5 * means["diffusion"]) / 2
        gradients = torch.autograd.grad(total, list(model.parameters()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert norm > 0.3  # so clipping matters
        expected = {
            "train/batch_loss": total.item(),
            "train/batch_ar_loss": means["ar"].item(),
            "train/batch_diffusion_loss": means["diffusion"].item(),
            "train/grad_norm": norm.item(),
            "train/lr": 1e-2,
        }
        assert {name: reported[step - 1][name] for name in expected} == pytest.approx(expected, rel=1e-5)
        with torch.no_grad():
            adamw(list(model.parameters()), gradients, moments, step)
    for ours, expected in zip(trainer.model.parameters(), model.parameters()):
        assert (whole(ours) - expected).norm() <= 1e-5 * expected.norm()

    with torch.no_grad():
        rows = [trainer.batches.held_out_rows[row] for row in range(len(trainer.batches.held_out_rows))]
        scores = [score_row(model, row) for row in rows]
    drafts = [target for row in scores for target in row["diffusion"]]
    expected = {}
    for place in range(BLOCK):
        here = [target for target in drafts if target[0] == place]
        weight = sum(target[1] for target in here)
        expected[f"val/diffusion_loss_at/{place}"] = float(sum(w * nll for _, w, nll, *_ in here) / weight)
        expected[f"val/accuracy_diff_at/{place}"] = float(sum(w * right for _, w, _, right, _ in here) / weight)
    prefixes = []
    for row in scores:
        right_at = {at: bool(right) for _, _, _, right, at in row["diffusion"]}
        for place, *_, at in row["diffusion"]:
            if place == 0 and all(at + k in right_at for k in range(BLOCK)) and in_one_block(row["diffusion"], at):
                prefixes.append(next((k for k in range(BLOCK) if not right_at[at + k]), BLOCK))
    expected["val/accepted_prefix"] = sum(prefixes) / len(prefixes)
    assert {name: validation[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def in_one_block(targets, at: int) -> bool:
    place_at = {target[-1]: target[0] for target in targets}
    return [place_at[at + k] for k in range(BLOCK)] == list(range(BLOCK))
