"""Runs from folders as they are published, and the tensors of such folders."""

from pathlib import Path

import torch
import uneven  # noqa: F401  (registers the source)
from runs import train_run
from safetensors.torch import load_file

from tidar.config import load_config
from tidar.data import load_tokenizer
from tidar.models.huggingface import read_model, resolve_model
from tidar.training.trainer import Trainer

SHORT = "--data.source uneven --training.seq_len 32 --training.local_batch_size 2 --data.num_workers 0".split()
SHORT += "--validation.enable false --metrics.log_freq 1".split()
TOKENS = 263  # ids of the tokenizer that tests write


def train(folder: Path, *options: str) -> Trainer:
    return train_run([*SHORT, "--job.dump_folder", str(folder), *options])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def resolve(*options: str, data_ids: int = 257):
    config = load_config(list(options))
    files = read_model(config)
    size = load_tokenizer(files.tokenizer).size if files.tokenizer else None
    return resolve_model(files, config.tidar.mask_token_id, data_ids, size)
