# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What this trainer does with each of torchtitan's keys, and what a resume does with every key.

torchtitan's keys are honoured (HONOURED) or, set to anything but their default, refused (REFUSED: why, what to do). On
a resume a key is held to what the run began with (FIXED: why), or taken from the new config from the next step on
(APPLIED). Needs the standard library alone.
"""

HONOURED = {
    "job": ("config_file", "dump_folder", "description", "print_config", "save_config_file"),
    "metrics": ("enable_tensorboard", "enable_wandb", "save_tb_folder", "disable_color_printing"),
    "model": ("name", "flavor", "hf_assets_path"),
    "optimizer": ("name", "lr", "beta1", "beta2", "eps", "weight_decay", "implementation"),
    "lr_scheduler": ("warmup_steps", "total_steps", "decay_ratio", "decay_type", "min_lr_factor"),
    "training": (
        *("dataset", "dataset_path", "seq_len", "steps", "max_norm", "gc_freq", "gc_debug"),
        *("dtype", "mixed_precision_param", "mixed_precision_reduce"),
    ),
    "parallelism": (
        *("data_parallel_replicate_degree", "data_parallel_shard_degree", "tensor_parallel_degree"),
        "fsdp_reshard_after_forward",
    ),
    "checkpoint": (
        *("enable", "folder", "interval", "enable_first_step_checkpoint", "keep_latest_k", "async_mode", "load_only"),
        *("load_step", "initial_load_path", "initial_load_model_only"),
        *("last_save_model_only", "last_save_in_hf", "export_dtype"),
    ),
    "activation_checkpoint": (
        *("mode", "selective_ac_option", "per_op_sac_force_recompute_mm_shapes_by_fqns"),
        *("early_stop", "preserve_rng_state", "determinism_check", "debug"),
    ),
    "comm": ("init_timeout_seconds", "trace_buf_size", "save_traces_folder", "save_traces_file_prefix"),
    "debug": ("seed", "deterministic", "deterministic_warn_only"),
}

_BATCH = "the batch of a step is [rl] prompts_per_step x group_size, packed by [rl] microbatch_tokens: set those"
_COMPILE = "torch.compile would give the trainer's forward pass other bits than the generator's; leave it out"
_CONVERTERS = "a converted model computes otherwise than the one that the generator runs; leave it out"
_PROFILER = "only torchtitan's own training loop calls its profiler; profile a rank from outside, with py-spy or nsys"
_ROWS = "prompts are rows in the controller's memory, no DataLoader reads them; leave it out"
_SPLIT = "policies here have no such split; spread the model by tensor_parallel_degree or data_parallel_shard_degree"
_VALIDATION = "held-out problems are what [evaluation] is for: set its interval and dataset_path"

# A section's name stands for all of its keys.
REFUSED = {
    "job.custom_config_module": "the job config is this folder's (config/sections.py); leave it out",
    "metrics.log_freq": "every step is logged: set it to 1 or leave it out",
    "metrics.save_for_all_ranks": "metrics are the job's, not a rank's; leave it out",
    "model.tokenizer_path": "set hf_assets_path, where the tokenizer lies with the weights",
    "model.converters": _CONVERTERS,
    "model.print_after_conversion": _CONVERTERS,
    "optimizer.early_step_in_backward": "the gradient of a step is clipped as a whole before it is taken; leave it out",
    "training.local_batch_size": _BATCH,
    "training.global_batch_size": _BATCH,
    "training.enable_cpu_offload": "parameters are not offloaded here; shard them with data_parallel_shard_degree",
    "training.dataloader": _ROWS,
    "parallelism.disable_loss_parallel": "the loss is computed on whole rows of logits as it is; leave it out",
    "parallelism.enable_async_tensor_parallel": _COMPILE,
    "parallelism.module_fqns_per_model_part": _SPLIT,
    "parallelism.pipeline_parallel_degree": _SPLIT,
    "parallelism.pipeline_parallel_first_stage_less_layers": _SPLIT,
    "parallelism.pipeline_parallel_last_stage_less_layers": _SPLIT,
    "parallelism.pipeline_parallel_layers_per_stage": _SPLIT,
    "parallelism.pipeline_parallel_schedule": _SPLIT,
    "parallelism.pipeline_parallel_schedule_csv": _SPLIT,
    "parallelism.pipeline_parallel_microbatch_size": _SPLIT,
    "parallelism.pipeline_parallel_expert_parallel_overlap": _SPLIT,
    "parallelism.context_parallel_degree": _SPLIT,
    "parallelism.context_parallel_load_balancer": _SPLIT,
    "parallelism.context_parallel_rotate_method": _SPLIT,
    "parallelism.expert_parallel_degree": _SPLIT,
    "parallelism.expert_tensor_parallel_degree": _SPLIT,
    "parallelism.expert_parallel_comm_backend": _SPLIT,
    "checkpoint.enable_ft_dataloader_checkpoints": "TorchFT is not used; leave it out",
    "checkpoint.initial_load_in_hf": "what initial_load_path holds is found out by looking; leave it out",
    "checkpoint.initial_load_in_hf_quantized": "a quantised checkpoint cannot be trained on; give the unquantised one",
    "checkpoint.exclude_from_loading": "to take the weights alone from a checkpoint, name it in initial_load_path",
    "checkpoint.create_seed_checkpoint": "a job starts from [model] hf_assets_path or initial_load_path; leave it out",
    "activation_checkpoint.memory_budget": _COMPILE,
    "activation_checkpoint.visualize_memory_budget_pareto": _COMPILE,
    "comm.train_timeout_seconds": "a step's time is bounded by [trainer] timeout_seconds, a collective's by "
    "init_timeout_seconds: set those",
    "comm.mode": "trainer ranks are real processes; leave it out",
    "debug.moe_force_load_balance": "the generator's router would send tokens elsewhere; leave it out",
    "profiling": _PROFILER,
    "compile": _COMPILE,
    "quantize": _CONVERTERS,
    "memory_estimation": "--dry_run says what a job takes",
    "fault_tolerance": "TorchFT is not used: [supervision] max_restarts starts lost processes again",
    "experimental": "modules and sections cannot be added from the config; leave it out",
    "validation": _VALIDATION,
}

# Values of refused keys that ask for what happens anyway.
SAME = {
    "metrics.log_freq": 1,
    "job.custom_config_module": "torchtitan.experiments.rl.unified.config.load",
}

# A job cannot be guessed from another model's defaults.
REQUIRED = ("model.hf_assets_path", "training.dataset")

_STATE = "the checkpoint's weights and optimizer state are of it"
_POSITION = "the checkpoint's position is one among the prompts that it makes"
_SAMPLED = "the policy that is trained is the distribution that it makes, and saved batches were drawn from it"
_GROUPS = "saved batches and the position among the prompts are counted in it"
_ALGORITHM = "steps before and after would belong to two different runs"
_REFERENCE = "with [policy_loss] kl_weight the reference policy is read from it again"

FIXED = {
    "model.hf_assets_path": _REFERENCE,
    "optimizer.name": _STATE,
    "training.dtype": _STATE,
    "training.mixed_precision_param": _ALGORITHM,
    "generator.dtype": _ALGORITHM,
    "rl.mode": _ALGORITHM,
    "policy_loss.name": _ALGORITHM,
    "advantage.name": _ALGORITHM,
    "rl.truncated_completions": _ALGORITHM,
    "sampling.temperature": _SAMPLED,
    "sampling.top_k": _SAMPLED,
    "sampling.top_p": _SAMPLED,
    "rl.group_size": _GROUPS,
    "rl.prompts_per_step": _GROUPS,
    "trajectory_queue.max_staleness": "the checkpoint holds the batches that were sampled ahead",
    "training.dataset": _POSITION,
    "training.seq_len": _POSITION,
    "debug.seed": _POSITION,
    "data.question_column": _POSITION,
    "data.answer_column": _POSITION,
    "data.overlong_prompts": _POSITION,
    "data.system_prompt": _POSITION,
    "data.template_kwargs": _POSITION,
    "data.special_tokens_in_text": _POSITION,
    "data.date": _POSITION,
}

# A section's name stands for all of its keys.
APPLIED = (
    *("job", "metrics", "checkpoint", "comm", "parallelism", "activation_checkpoint", "lr_scheduler", "parity"),
    *("evaluation", "trainer", "supervision", "cluster", "weight_sync", "reward"),
    # Whether the checkpoint is of the model is looked up in the checkpoint.
    *("model.name", "model.flavor"),
    *("training.dataset_path", "training.steps", "training.max_norm", "training.mixed_precision_reduce"),
    *("training.gc_freq", "training.gc_debug", "debug.deterministic", "debug.deterministic_warn_only"),
    *("optimizer.lr", "optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.weight_decay"),
    "optimizer.implementation",
    *("rl.microbatch_tokens", "rl.log_samples", "rl.record_replay", "sampling.max_tokens", "sampling.stop"),
    "sampling.special_tokens_in_text",
    *("policy_loss.clip_low", "policy_loss.clip_high", "policy_loss.kl_weight", "policy_loss.tis_cap"),
    *("generator.replicas", "generator.tensor_parallel_degree", "generator.kv_cache_gib", "generator.block_size"),
    *("generator.max_num_seqs", "generator.max_num_batched_tokens", "generator.enable_prefix_caching"),
    *("generator.num_threads", "generator.cores", "generator.attention_backend", "generator.cuda_graphs"),
    "generator.timeout_seconds",
)
