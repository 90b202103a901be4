"""Finds the nearest valid name for a wrong one: by other projects' names, then by spelling.

The caller says which names are valid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches

# Names that other projects, papers and people use for a key of this config.
ALIASES = {
    "name": "run_name run_id experiment run exp_name",
    "storage_path": "out_dir output_dir save_dir storage results_dir log_dir out",
    "seed": "random_seed rng_seed manual_seed",
    "data.source": "path train_path train_file dataset data_path files text corpus input",
    "data.val_source": "val_path val_file validation_file validation_path eval_file dev_file "
    "val_data valid_file",
    "data.test_source": "test_path test_file test_data",
    "data.separator": "delimiter document_separator eot_string sep",
    "data.encoding": "file_encoding charset codec",
    "data.text_column": "column text_field text_key",
    "data.tokenizer": "tokenizer_name tokeniser",
    "data.vocab_size": "vocab n_vocab vocabulary",
    "data.eos_token": "eos end_of_text bos_eos_token eod_token document_separator_token",
    "data.split": "splits val_split train_split val_fraction split_ratio train_ratio test_split",
    "data.fraction": "data_fraction subset train_fraction",
    "model.n_layer": "n_layers num_layers layers num_hidden_layers depth num_blocks n_blocks",
    "model.n_head": "n_heads num_heads heads num_attention_heads",
    "model.n_kv_head": "n_kv_heads num_key_value_heads num_kv_heads kv_heads n_query_groups",
    "model.head_dim": "head_size head_width d_head kv_channels",
    "model.n_embd": "hidden hidden_size d_model embed_dim n_embed emb_dim embedding_size dim "
    "hidden_dim width n_emb",
    "model.n_inner": "intermediate_size d_ff ffn_dim mlp_dim",
    "model.n_positions": "context_length n_ctx max_position_embeddings max_seq_len "
    "max_sequence_length",
    "model.dropout": "dropout_p pdrop drop_rate resid_pdrop embd_pdrop attn_pdrop dropout_rate",
    "model.norm": "layernorm layer_norm normalization",
    "model.post_norm": "norm_after norm_position",
    "model.residual": "residuals skip skip_connections shortcut",
    "model.parallel_residual": "use_parallel_residual parallel_attn",
    "model.layer_norm_epsilon": "layer_norm_eps norm_eps ln_eps rms_norm_eps",
    "model.positions": "position_embedding position_embeddings pos_emb position_embedding_type",
    "model.rope_theta": "rope_base rotary_emb_base rotary_base",
    "model.partial_rotary_factor": "rotary_pct rotary_percentage rope_fraction rotary_fraction",
    "model.rope_scaling": "rope_parameters",
    "model.mlp": "activation activation_function hidden_act mlp_class act_fn",
    "model.qkv_bias": "attention_bias bias qkv_proj_bias",
    "model.local_rope_theta": "rope_local_base_freq local_rope_base",
    "model.scale_embedding": "scale_embeddings",
    "model.embedding_multiplier": "embedding_scale embed_scale",
    "model.residual_multiplier": "residual_scale",
    "model.logits_scaling": "logit_scale logits_scale",
    "model.attention_scale": "attention_multiplier attn_scale",
    "model.sandwich_norm": "peri_norm pre_post_norm",
    "model.no_rope_layers": "no_rope_layer_interval nope_layers",
    "model.qk_norm": "query_key_norm use_qk_norm norm_qk",
    "model.sliding_window": "sliding_window_size attention_window window_size",
    "model.layer_types": "sliding_window_pattern attention_types",
    "model.tie_word_embeddings": "tie_weights weight_tying tie_embeddings tied",
    "model.initializer_range": "init_std init_range",
    "model.init_from": "pretrained pretrained_model_name_or_path checkpoint model_name init "
    "load_from",
    "model.resize_vocab": "resize_token_embeddings resize_embeddings resize_embedding grow_vocab",
    "model.checkpoint_blocks": "gradient_checkpointing activation_checkpointing "
    "activation_checkpoint recompute remat checkpoint_activations",
    "lora.rank": "r lora_r lora_rank adapter_rank",
    "lora.alpha": "lora_alpha",
    "lora.use_rslora": "rslora rank_stabilized",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_targets lora_target_modules",
    "lora.train": "modules_to_save also_train",
    "optim.lr": "learning_rate max_lr peak_lr base_lr learningrate",
    "optim.min_lr": "lr_min final_lr min_learning_rate eta_min lr_end",
    "optim.schedule": "scheduler lr_scheduler lr_schedule decay decay_lr lr_scheduler_type "
    "lr_decay_style",
    "optim.decay_fraction": "cooldown_fraction cooldown cooldown_frac decay_frac decay_ratio "
    "cooldown_steps",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps n_warmup_steps lr_warmup_steps",
    "optim.step_size": "lr_step_size decay_steps",
    "optim.gamma": "lr_gamma decay_rate",
    "optim.betas": "beta beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "epsilon adam_eps adam_epsilon",
    "optim.weight_decay": "wd decay_weight l2",
    "optim.weight_decay_schedule": "wd_schedule weight_decay_scheduler wd_scheduler "
    "weight_decay_incr_style",
    "optim.max_grad_norm": "grad_clip clip clip_grad gradient_clip_val max_norm clip_grad_norm "
    "gradient_clipping grad_norm_clip",
    "train.max_steps": "steps iters max_iters iterations num_steps n_steps num_iterations epochs "
    "num_epochs num_train_epochs max_epochs train_steps total_steps lr_decay_iters",
    "train.global_batch_size": "batch_size bs batch train_batch_size total_batch_size batchsize "
    "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches",
    "train.micro_batch_size": "device_batch_size per_device_train_batch_size micro_bs "
    "per_device_batch_size",
    "train.block_size": "block context seq_len sequence_length max_length context_size seq_length "
    "window",
    "train.eval_interval": "eval_every eval_steps eval_freq val_interval evaluation_interval "
    "val_check_interval eval_iters",
    "train.log_interval": "log_every logging_steps log_freq log_steps",
    "train.patience": "early_stopping_patience early_stopping early_stop",
    "train.min_delta": "early_stopping_threshold delta",
    "train.ema": "ema_decay ema_beta weight_averaging model_ema averaging swa",
    "train.teachers": "teacher teacher_model teacher_models teacher_model_name_or_path distill "
    "distill_from distillation_teacher",
    "train.teacher_weight": "distillation_weight distill_weight kd_weight kd_alpha distill_alpha "
    "kd_ratio lmbda",
    "train.precision": "dtype mixed_precision amp fp16 bf16 fp32",
    "train.compile": "torch_compile compile_model",
    "train.deterministic": "use_deterministic_algorithms full_determinism reproducible "
    "cudnn_deterministic",
    "train.resume": "resume_from resume_from_checkpoint auto_resume restart",
    "compute.num_workers": "workers devices num_gpus gpus n_gpus world_size num_processes "
    "nproc_per_node n_workers num_devices",
    "compute.strategy": "ddp fsdp fsdp2 fully_shard distributed_strategy sharding zero "
    "sharding_strategy zero_stage parallelism",
    "compute.reduce_dtype": "reduce_precision mixed_precision_reduce communication_data_type "
    "comm_hook gradient_compression",
    "compute.label_selector": "labels node_selector node_labels",
    "compute.accelerator_type": "gpu_type accelerators instance_type",
    "compute.use_gpu": "gpu cuda device accelerator use_cuda",
    "compute.cpus_per_worker": "cpus num_cpus threads cores num_threads cpu_per_worker",
    "compute.max_failures": "retries max_retries failures max_restarts",
    "compute.num_to_keep": "save_total_limit keep keep_last num_checkpoints checkpoints_to_keep",
    "compute.wait_s": "wait_timeout wait_timeout_s max_wait queue_timeout placement_timeout",
    "compute.gpus_per_worker": "gpu_fraction gpus_per_trial gpu_per_trial",
    "track.mlflow": "report_to tracking_uri mlflow_tracking_uri mlflow_uri logger loggers",
    "track.wandb": "wandb_project wandb_log use_wandb",
    "track.trackio": "trackio_project",
    "tune.space": "search_space param_space hyperparameters",
    "tune.num_samples": "trials n_trials num_trials n_samples",
    "tune.search_alg": "searcher algorithm",
    "tune.max_concurrent_trials": "concurrency max_concurrent parallel_trials concurrent_trials",
    "tune.reduction_factor": "eta",
    "tune.min_gain": "min_improvement improvement_threshold",
    "sample.prompt": "prompts start start_text",
    "sample.max_new_tokens": "max_tokens max_completion_tokens num_tokens length new_tokens",
    "sample.min_new_tokens": "min_tokens min_length",
    "sample.temperature": "temp",
    "sample.top_k": "topk k",
    "sample.top_p": "topp nucleus",
    "sample.repetition_penalty": "repeat_penalty rep_penalty",
    "sample.stop": "stop_strings stop_sequences stop_words",
    "sample.stop_token_ids": "eos_token_id eos_token_ids stop_tokens stop_ids",
    "sample.include_stop_str_in_output": "include_stop keep_stop",
    "generate.num_samples": "num_return_sequences n best_of samples_per_prompt",
    "generate.prefix": "column_prefix input_prefix",
    "serve.host": "address bind",
    "serve.port": "http_port",
    "serve.api_key_file": "api_key api_keys api_key_path",
    "serve.allowed_hosts": "trusted_hosts host_names server_name hostnames",
    "serve.allowed_origins": "cors cors_origins allow_origins",
    "serve.num_replicas": "replicas n_replicas",
    "serve.max_outputs": "max_choices max_completions max_batch_prompts",
    "serve.max_waiting": "max_queue queue_size max_queued_requests",
    "serve.request_timeout_s": "timeout request_timeout",
    "serve.body_timeout_s": "client_body_timeout read_timeout header_timeout receive_timeout",
    "serve.served_model_name": "model_id served_name",
    "export.format": "outformat to_format",
    "export.output_path": "outfile out_path target",
}


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the choice spelled most like the word, None if none is close."""
    found = get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest_keys(typed: str, keys: Sequence[str]) -> list[str]:
    """Return the keys most likely meant by a wrong dotted key; several only if equally likely."""
    word = re.sub(r"[^a-z0-9_.]", "_", typed.lower().strip())
    if word in keys:
        return [word]
    section, _, leaf = word.rpartition(".")
    same_leaf = [key for key in keys if key.rpartition(".")[2] == leaf]
    if same_leaf:
        near = nearest(section, [key.rpartition(".")[0] for key in same_leaf])
        return [f"{near}.{leaf}"] if near else same_leaf
    # Another project's name is not a misspelling: train.remat does not mean train.ema.
    if known := [key for key in keys if leaf in ALIASES.get(key, "").split()]:
        return list(dict.fromkeys(_in_section(section, key, keys) for key in known))
    best = max(keys, key=lambda key: _similarity(word, key))
    return [_in_section(section, best, keys)] if _similarity(word, best) >= 0.6 else []


def _in_section(section: str, key: str, keys: Sequence[str]) -> str:
    """The key, or its namesake in that section, since several have, say, a precision."""
    beside = f"{section}.{key.rpartition('.')[2]}"
    return beside if beside in keys else key


def _similarity(word: str, key: str) -> float:
    """Similarity of two dotted keys, 0 to 1; a match of the last parts alone weighs less."""
    leaf, name = word.rpartition(".")[2], key.rpartition(".")[2]
    pairs = [(1.0, word, key)] * ("." in word) + [(0.9, leaf, name)]
    pairs += [(0.85, leaf, alias) for alias in ALIASES.get(key, "").split()]
    return max(
        weight * SequenceMatcher(None, one, other, autojunk=False).ratio()
        for weight, one, other in pairs
    )


def did_you_mean(*names: str | None) -> str:
    """Return "; did you mean a or b?", or nothing if there is no name to offer."""
    known = [name for name in names if name]
    return f"; did you mean {' or '.join(known)}?" if known else ""
