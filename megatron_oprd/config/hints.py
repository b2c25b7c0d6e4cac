"""Find the key of the configuration that a user meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache

from megatron_oprd.config.root import Config
from megatron_oprd.config.section import Section, section_class

# Names of TRL, verl and Megatron-LM, and other common ones.
SYNONYMS = {
    "learning_rate": ("optimizer.lr",),
    "min_lr": ("optimizer.schedule",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "lr_decay_style": ("optimizer.schedule",),
    "warmup": ("optimizer.warmup_fraction",),
    "warmup_ratio": ("optimizer.warmup_fraction",),
    "warmup_steps": ("optimizer.warmup_fraction",),
    "adam_beta1": ("optimizer.betas",),
    "adam_beta2": ("optimizer.betas",),
    "wd": ("optimizer.weight_decay",),
    "max_grad_norm": ("optimizer.clip_grad",),
    "grad_clip": ("optimizer.clip_grad",),
    "batch_size": ("rollout.prompts_per_step", "batch.max_tokens_per_micro_batch"),
    "train_batch_size": ("rollout.prompts_per_step",),
    "global_batch_size": ("rollout.prompts_per_step",),
    "micro_batch_size": ("batch.max_tokens_per_micro_batch",),
    "per_device_train_batch_size": ("batch.max_tokens_per_micro_batch",),
    "ppo_mini_batch_size": ("rollout.prompts_per_step",),
    "gradient_accumulation_steps": ("batch.max_tokens_per_micro_batch",),
    "num_generations": ("rollout.samples_per_prompt",),
    "n": ("rollout.samples_per_prompt",),
    "max_completion_length": ("rollout.max_new_tokens",),
    "max_response_length": ("rollout.max_new_tokens",),
    "max_tokens": ("rollout.max_new_tokens",),
    "max_length": ("rollout.max_new_tokens",),
    "max_prompt_length": ("data.max_prompt_tokens",),
    "prompt_length": ("data.max_prompt_tokens",),
    "dataset": ("data.prompts",),
    "dataset_name": ("data.prompts",),
    "train_files": ("data.prompts",),
    "data_path": ("data.prompts",),
    "eval_data": ("evaluation.data",),
    "val_files": ("evaluation.data",),
    "tp": ("parallel.tensor",),
    "tp_size": ("parallel.tensor",),
    "tensor_parallel": ("parallel.tensor",),
    "tensor_parallel_size": ("parallel.tensor",),
    "tensor_model_parallel_size": ("parallel.tensor",),
    "pp": ("parallel.pipeline",),
    "pp_size": ("parallel.pipeline",),
    "pipeline_parallel": ("parallel.pipeline",),
    "pipeline_parallel_size": ("parallel.pipeline",),
    "pipeline_model_parallel_size": ("parallel.pipeline",),
    "cp": ("parallel.context",),
    "context_parallel_size": ("parallel.context",),
    "ep": ("parallel.expert",),
    "expert_parallel_size": ("parallel.expert",),
    "expert_model_parallel_size": ("parallel.expert",),
    "sp": ("parallel.sequence",),
    "sequence_parallel": ("parallel.sequence",),
    "vpp": ("parallel.virtual_pipeline",),
    "use_distributed_optimizer": ("parallel.distributed_optimizer",),
    "nproc": ("parallel.world_size",),
    "max_steps": ("train.steps",),
    "num_steps": ("train.steps",),
    "total_training_steps": ("train.steps",),
    "train_iters": ("train.steps",),
    "epochs": ("train.steps",),
    "num_train_epochs": ("train.steps",),
    "output_dir": ("train.run_dir",),
    "output": ("train.run_dir",),
    "out": ("train.run_dir",),
    "default_local_dir": ("train.run_dir",),
    "save_steps": ("checkpoint.every",),
    "save_freq": ("checkpoint.every",),
    "save_interval": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "resume_from_checkpoint": ("checkpoint.resume",),
    "eval_steps": ("evaluation.every",),
    "test_freq": ("evaluation.every",),
    "eval_interval": ("evaluation.every",),
    "model": ("student.path",),
    "model_path": ("student.path",),
    "model_name_or_path": ("student.path",),
    "student_model": ("student.path",),
    "student_path": ("student.path",),
    "teacher_model": ("teacher.path",),
    "teacher_path": ("teacher.path",),
    "teacher_model_name_or_path": ("teacher.path",),
    "bf16": ("precision.dtype",),
    "torch_dtype": ("precision.dtype",),
    "mixed_precision": ("precision.dtype",),
    "gradient_checkpointing": ("recompute.granularity",),
    "recompute_granularity": ("recompute.granularity",),
    "activation_checkpointing": ("recompute.granularity",),
}
CLOSE = 0.75  # similarity from which two names are taken for a misspelling of each other
MOST = 3  # suggestions


def suggest_keys(name: str) -> list[str]:
    """Return the dotted keys that an unknown name may stand for, the best first, or an empty list.

    `name` is the last part of the unknown key.
    """
    keys = known_keys()
    synonym = SYNONYMS.get(name.lower())
    if synonym:
        return list(synonym)
    same = [key for key in keys if key.rpartition(".")[2] == name.lower()]
    if same:
        return sorted(same, key=lambda key: key.count("."))[:MOST]
    leaves = {key.rpartition(".")[2]: key for key in reversed(keys)} | {old: new[0] for old, new in SYNONYMS.items()}
    near = difflib.get_close_matches(name, leaves, n=1, cutoff=CLOSE)
    return [leaves[near[0]]] if near else []


@cache
def known_keys() -> list[str]:
    """Return every dotted key of the configuration, sections included."""
    return list(_keys(Config, ""))


def _keys(model: type[Section], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = section_class(field.annotation)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")
