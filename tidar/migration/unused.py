"""Keys of both files that do not become options, and why."""

# keys of which only one value is supported (None: the key must not be given), and why or what to do
REQUIRED = {
    "amp.enabled": (False, "use fp16 or bf16"),
    "torch_autocast.enabled": (False, "use fp16 or bf16"),
    "elasticity.enabled": (False, "give the batch sizes"),
    "quantize_training.enabled": (False, "weights are not quantized here"),
    "gradient_allreduce_op": ("mean", "gradients here are those of a mean"),
    "optimizer.params.amsgrad": (False, "AMSGrad does not exist here"),
    "optimizer.params.bias_correction": (True, "moments are corrected here"),
    "optimizer.params.maximize": (False, "the loss is minimized here"),
    "optimizer.params.max_grad_norm": (None, "use gradient_clipping, as DeepSpeed demands too"),
    "scheduler.params.last_batch_iteration": (-1, "a new run starts at the first step"),
    "zero_optimization.zenflow": (None, "no update is delayed here"),
}

LOGS = "job.dump_folder has metrics.jsonl and tb/, with losses, rates, speed, MFU and memory of every run"
PRECISION = "parameters, gradients and moments are float32; training.mixed_precision_param is the compute dtype"
FSDP2 = "FSDP2 gathers and reduces one decoder layer at a time, always while others are computed"
OFFLOAD = "FSDP2 keeps what is offloaded in the host's memory, pinned, and moves one decoder layer at a time"
PARALLELISM = "see parallelism.tensor_parallel_degree and context_parallel_degree; others are not supported"
SHARDING = "here parallelism.data_parallel_shard_degree is the number of devices that hold the state once"
BF16_KEYS = "immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
# by section: why keys have no effect here, and which; the reason of a section applies to all of its keys
SCRIPT_REASONS = {"": {"the name of a run is its folder, job.dump_folder": "model_name", LOGS: "logger_file"}}
DEEPSPEED_REASONS = {
    "": {
        LOGS: "wall_clock_breakdown memory_breakdown dump_state flops_profiler timers comms_logger log_level "
        "tensorboard wandb csv_monitor comet",
        PRECISION: "communication_data_type seq_parallel_comm_data_type data_types",
        "the trainer counts micro-batches itself": "managed_gradient_accumulation",
        "the loss is divided first, and gradients are summed": "prescale_gradients gradient_predivide_factor",
        "gradients are dense, and FSDP2 reduces and gathers them": "sparse_gradients disable_allgather",
        "not enabled": "amp torch_autocast",
        "not enabled; a run resumes on any number of devices that the batch size allows": "elasticity",
        "has an effect in DeepSpeed only if the model calls its checkpoint function; here activation_checkpoint.mode "
        "says what is recomputed": "activation_checkpointing",
        "has an effect only in a model or script that asks for it, and the script did not": "curriculum_learning "
        "data_efficiency progressive_layer_drop eigenvalue quantize_training compression_training sparse_attention "
        "weight_quantization hybrid_engine",
        PARALLELISM: "tensor_parallel expert_parallel pipeline sequence_parallel_size data_parallel_size "
        "use_data_before_expert_parallelism",
        "checkpoints load on any number of devices; [checkpoint] says when they are written": "checkpoint",
        "nothing is kept on NVMe or in a service": "aio nebula datastates_ckpt",
        "training.local_batch_size is set by hand": "autotuning",
        "here compile.enable says what is compiled": "compile graph_harvesting",
        "the last rows of an epoch share a step with the first of the next": "dataloader_drop_last",
        "here training.gc_freq says when garbage is collected": "disable_python_gc",
        "the model's config.json has it": "vocabulary_size",
        "there is one AdamW here, for all settings": "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
    },
    "optimizer": {"AdamW is fused here": "legacy_fusion"},
    "optimizer.params": {
        "AdamW is fused here": "torch_adam set_grad_none foreach fused capturable differentiable fp32_optimizer_states",
        "weight decay is decoupled, or 0": "adam_w_mode",
    },
    "fp16": {
        PRECISION: "auto_cast fused_mode fp16_master_weights_and_grads",
        "restored only when the scale doubles": "consecutive_hysteresis",
        "the scale is constant, or there is none": "loss_scale initial_scale_power loss_scale_window hysteresis "
        "min_loss_scale",
    },
    "bf16": {PRECISION: BF16_KEYS},
    "bfloat16": {PRECISION: BF16_KEYS},
    "zero_optimization": {
        FSDP2: "allgather_partitions allgather_bucket_size allgather_size overlap_comm reduce_scatter "
        "reduce_bucket_size contiguous_gradients use_multi_rank_bucket_allreduce round_robin_gradients "
        "parameter_alignment legacy_stage1 ignore_unused_parameters sub_group_size prefetch_bucket_size "
        "param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance "
        "module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential compute_grad_norm "
        "partition_stream_chunk_size leaf_module memory_efficient_linear override_module_apply "
        "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
        OFFLOAD: "offload_optimizer offload_param cpu_offload cpu_offload_param cpu_offload_use_pin_memory",
        SHARDING: "mics_shard_size mics_hierarchical_params_gather zero_hpz_partition_size",
        "nothing is quantized here": "zero_quantized_weights zero_quantized_nontrainable_weights "
        "zero_quantized_gradients zeropp_loco_param",
        "checkpoints are float32 and load on any number of devices; exports hold whole weights": "elastic_checkpoint "
        "load_from_fp32_weights pipeline_loading_checkpoint gather_16bit_weights_on_model_save "
        "gather_fp16_weights_on_model_save",
    },
}


def by_path(reasons: dict[str, dict[str, str]]) -> dict[tuple[str, ...], str]:
    """The reason for each key."""
    return {
        (*filter(None, section.split(".")), key): reason
        for section, groups in reasons.items()
        for reason, keys in groups.items()
        for key in keys.split()
    }
