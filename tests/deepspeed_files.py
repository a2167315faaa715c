"""The files of the DeepSpeed script, and what they are converted to."""

import dataclasses
import json
from copy import deepcopy
from pathlib import Path

from tidar.config import Config, load_config
from tidar.migrate import migrate

ROOT = Path(__file__).parents[1]

SCRIPT = {
    "data_dir": ["./train_data/sharegpt", "./train_data/ultrachat"],
    "ckpt_dir": "./tidar_checkpoints",
    "existing_model_path": None,
    "qwen_model_path": "Qwen/Qwen2.5-1.5B",
    "model_name": "tidar-1.5B",
    "logger_file": "training",
    "num_epochs": 100,
    "start_epoch": 0,
    "save_interval": 10,
    "max_len": 4096,
    "num_workers": 4,
    "run_mode": "train",
    "tidar_block_size": 8,
    "tidar_clean_ratio": 0.5,
    "ar_loss_weight": 1,
    "diffusion_loss_weight": 1,
}
FP16 = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 100,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-05, "betas": [0.9, 0.999], "eps": 1e-08, "weight_decay": 0.01}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 3e-06, "warmup_max_lr": 1e-05, "warmup_num_steps": 100, "total_num_steps": 10000},
    },
    "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
    },
    "wall_clock_breakdown": False,
}
BF16 = {key: value for key, value in FP16.items() if key != "fp16"} | {
    "train_batch_size": 512,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
}

# of both files, where they differ from the defaults
EXPECTED = {
    "job.dump_folder": "./tidar_checkpoints",
    "model.hf_path": "Qwen/Qwen2.5-1.5B",
    "data.source": "gumiho",
    "data.paths": ["./train_data/sharegpt", "./train_data/ultrachat"],
    "data.packing": False,
    "data.num_workers": 4,
    "training.seq_len": 2048,
    "training.local_batch_size": 4,
    "training.epochs": 100.0,
    "parallelism.fsdp_reshard_after_forward": "never",
    "optimizer.lr": 1e-5,
    "optimizer.beta2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.decay_params": "all",
    "lr_scheduler.schedule": "WarmupDecayLR",
    "lr_scheduler.warmup_steps": 100,
    "lr_scheduler.total_steps": 10000,
    "lr_scheduler.warmup_min_lr_factor": 0.3,
    "validation.enable": False,
    "checkpoint.export_epochs": 10,
    "metrics.log_freq": 100,
}
FP16_EXPECTED = EXPECTED | {"training.global_batch_size": 32, "training.mixed_precision_param": "float16"}

BF16_EXPECTED = EXPECTED | {"training.global_batch_size": 512, "training.mixed_precision_param": "bfloat16"}


def changed(values: dict, **changes) -> dict:
    """A copy with other values; `scheduler__params__warmup_type` names a key of a section, ... takes a key away."""
    values = deepcopy(values)
    for name, value in changes.items():
        *sections, key = name.split("__")
        part = values
        for section in sections:
            part = part.setdefault(section, {})
        part[key] = value
        if value is ...:
            del part[key]
    return values


class Converted:
    """The output for two files, its warnings, and the options that it loads to."""

    def __init__(self, folder: Path, script: dict, deepspeed: dict):
        names = []
        for name, values in (("train_config.json", script), ("ds_config.json", deepspeed)):
            (folder / name).write_text(json.dumps(values))
            names.append(str(folder / name))
        self.text, self.warnings = migrate(*names)
        self.file = folder / "new.toml"
        self.file.write_text(self.text, encoding="utf-8")
        self.config = load_config(["--job.config_file", str(self.file)])
        self.words = " ".join(self.text.replace("\n# ", " ").split())


def differences(config: Config) -> dict:
    """Options that are not the defaults."""
    found = {}
    for section in dataclasses.fields(Config):
        for name, value in vars(getattr(config, section.name)).items():
            if value != getattr(section.type(), name) and name != "config_file":
                found[f"{section.name}.{name}"] = value
    return found


def option(config: Config, name: str):
    section, _, name = name.partition(".")
    return getattr(getattr(config, section), name)


def merged(first: dict, second: dict) -> dict:
    both = deepcopy(first) | second
    return both | {key: merged(first[key], second[key]) for key in first if isinstance(second.get(key), dict)}
