"""Every key of the DeepSpeed script's files is answered, or named in a warning."""

import json

import pytest
from deepspeed_files import FP16, ROOT, SCRIPT, Converted, changed, merged, option


@pytest.fixture
def convert(tmp_path):
    return lambda script=SCRIPT, deepspeed=FP16: Converted(tmp_path, script, deepspeed)


# Documented by DeepSpeed, or once so; what is not taken from the fixtures
OTHER_KEYS = {
    "managed_gradient_accumulation": True,
    "communication_data_type": "fp16",
    "seq_parallel_comm_data_type": "fp32",
    "gradient_allreduce_op": "mean",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "sparse_gradients": False,
    "disable_allgather": False,
    "bf16": {
        "enabled": False,
        "immediate_grad_update": True,
        "check_grad_overflow": False,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
    },
    "amp": {"enabled": False, "opt_level": "O1"},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "aio": {"block_size": 1048576},
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False, "profile": False},
    "memory_breakdown": False,
    "dump_state": False,
    "disable_python_gc": False,
    "autotuning": {"enabled": False},
    "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    "flops_profiler": {"enabled": True, "profile_step": 1},
    "comms_logger": {"enabled": True},
    "tensorboard": {"enabled": True, "job_name": "x"},
    "wandb": {"enabled": True},
    "csv_monitor": {"enabled": False},
    "comet": {"enabled": False},
    "timers": {"throughput": {"enabled": True}},
    "data_efficiency": {"enabled": False},
    "curriculum_learning": {"enabled": False},
    "progressive_layer_drop": {"enabled": False},
    "sparse_attention": {"mode": "fixed"},
    "compression_training": {"weight_quantization": {}},
    "quantize_training": {"enabled": False},
    "hybrid_engine": {"enabled": False},
    "tensor_parallel": {"autotp_size": 1},
    "expert_parallel": {"enabled": False},
    "pipeline": {"stages": "auto"},
    "checkpoint": {"tag_validation": "Warn"},
    "nebula": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "dataloader_drop_last": False,
    "compile": {"deepcompile": False},
    "graph_harvesting": False,
    "use_data_before_expert_parallelism": False,
    "vocabulary_size": 151936,
    "optimizer": {
        "legacy_fusion": False,
        "params": {
            "bias_correction": True,
            "amsgrad": False,
            "adam_w_mode": True,
            "torch_adam": False,
            "set_grad_none": True,
        },
    },
    "scheduler": {"params": {"warmup_type": "cubic", "last_batch_iteration": -1}},
    "fp16": {
        "auto_cast": False,
        "initial_scale_power": 16,
        "consecutive_hysteresis": True,
        "fp16_master_weights_and_grads": False,
    },
    "zero_optimization": {
        "stage": 3,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "compute_grad_norm": True,
        "ignore_unused_parameters": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 5e8,
        "stage3_param_persistence_threshold": 1e6,
        "stage3_module_granularity_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_gather_fp16_weights_on_model_save": True,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "mics_shard_size": -1,
        "memory_efficient_linear": True,
        "log_trace_cache_warnings": False,
        "cpu_offload": True,
        "cpu_offload_param": True,
        "cpu_offload_use_pin_memory": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.3, "buffer_count": 4, "fast_init": False},
        "offload_param": {"device": "cpu", "nvme_path": "/local_nvme", "buffer_size": 1e8, "max_in_cpu": 1e9},
    },
}

SECTIONS = {
    "optimizer",
    "scheduler",
    "params",
    "fp16",
    "bf16",
    "zero_optimization",
    "offload_optimizer",
    "offload_param",
}


def leaves(values: dict, path: str = "") -> dict:
    """Keys and their values, those of converted sections with the section's name."""
    found = {}
    for key, value in values.items():
        is_section = key in SECTIONS and isinstance(value, dict)
        found |= leaves(value, f"{path}{key}.") if is_section else {path + key: value}
    return found


DOCUMENTED = merged(FP16, OTHER_KEYS)


@pytest.mark.parametrize("key", [*SCRIPT, *leaves(DOCUMENTED)])
def test_every_key_is_answered(every_key, key):
    value = (SCRIPT | leaves(DOCUMENTED))[key]
    assert f"{key} = {json.dumps(value)}" in every_key.words
    assert not any("not known" in warning for warning in every_key.warnings)


@pytest.fixture(scope="module")
def every_key(tmp_path_factory):
    return Converted(tmp_path_factory.mktemp("every_key"), SCRIPT, DOCUMENTED)


def test_placeholders_are_answered(convert):
    """Each number and switch of the recipe, "auto" at once, as in a file for Hugging Face's Trainer."""

    def auto(values: dict) -> dict:
        return {key: auto(value) if key in SECTIONS else "auto" for key, value in values.items()}

    deepspeed = auto(DOCUMENTED) | {"scheduler": auto(FP16["scheduler"]) | {"type": "WarmupDecayLR"}}
    deepspeed["optimizer"]["type"] = "AdamW"
    deepspeed["zero_optimization"] |= {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": None}
    converted = convert(SCRIPT, deepspeed)
    for key, value in leaves(deepspeed).items():
        if value == "auto":
            assert f'{key} = "auto", which only Hugging Face\'s Trainer fills in' in converted.words
    assert any("set training.global_batch_size by hand" in warning for warning in converted.warnings)
    expected = {
        "training.mixed_precision_param": "auto",
        "training.max_norm": 1.0,
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.0,
        "lr_scheduler.warmup_steps": 1000,
        "lr_scheduler.total_steps": -1,
    }
    assert {name: option(converted.config, name) for name in expected} == expected
    # one rate that is given stands for the other
    for key in ("optimizer__params__lr", "scheduler__params__warmup_max_lr"):
        assert convert(SCRIPT, changed(deepspeed, **{key: 2e-5})).config.optimizer.lr == 2e-5


def test_warnings_name_what_is_left_to_do(convert):
    script = changed(SCRIPT, tidar_clean_ratio=0.75, existing_key=1, qwen_model_path=str(ROOT))
    deepspeed = changed(FP16, train_batch_size=..., gradient_accumulation_steps=2, fp16__gradient_cliping=1)
    ratio, batch, script_key, deepspeed_key = convert(script, deepspeed).warnings
    assert "train_config.json: tidar_clean_ratio = 0.75: is of tidar.pattern = tidar_split" in ratio
    assert "training.global_batch_size" in batch and "4 x 2 x devices" in batch
    assert "train_config.json: existing_key = 1: not known" in script_key
    assert "ds_config.json: fp16.gradient_cliping = 1: not known" in deepspeed_key
