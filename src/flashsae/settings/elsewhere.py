"""What other libraries call our settings: whoever types their name is asked for ours."""

from __future__ import annotations

from collections.abc import Iterable

from flashsae.natural import did_you_mean

_ELSEWHERE = {
    "activations": ("activations_path", "cached_activations_path"),
    "arch": ("architecture", "trainer_class"),
    "auxk_alpha": ("aux_loss_coefficient", "auxk_coefficient"),
    "bandwidth": ("jumprelu_bandwidth",),
    "batch_tokens": ("batch_size", "train_batch_size", "train_batch_size_tokens", "sae_batch_size"),
    "checkpoint_every_steps": ("n_checkpoints", "save_every", "save_steps"),
    "clip_norm": ("max_grad_norm", "grad_clip"),
    "context_length": ("context_size", "ctx_len", "max_length", "max_seq_len"),
    "d_in": ("activation_dim", "d_model", "input_dim"),
    "d_sae": ("dict_size", "expansion_factor", "hidden_dim", "n_features", "n_latents", "num_latents"),
    "dataset": ("dataset_name", "dataset_path"),
    "dead_after_tokens": ("dead_feature_threshold", "dead_feature_window", "feature_sampling_window"),
    "export": ("export_to",),
    "forward_tokens": ("batch_size", "llm_batch_size", "store_batch_size_prompts"),
    "hookpoint": ("hook_layer", "hook_name", "hook_point", "hookpoints", "layer", "layers", "module", "submodule_name"),
    "initial_threshold": ("jumprelu_init_threshold",),
    "init_from": ("finetune", "from_pretrained_path"),
    "k": ("top_k", "topk"),
    "l1": ("l1_coefficient", "l1_lambda", "l1_penalty", "sparsity_penalty"),
    "log_every_steps": ("log_every", "log_steps", "logging_steps"),
    "lr": ("learning_rate",),
    "max_documents": ("max_examples", "n_documents"),
    "model": ("model_name", "model_name_or_path"),
    "multi_topk": ("use_multi_topk",),
    "precision": ("autocast", "mixed_precision"),
    "quantize": ("load_in_4bit", "load_in_8bit"),
    "out": ("output_dir", "output_path", "save_dir"),
    "run": ("checkpoint_path", "out", "output_dir", "output_path", "run_name", "save_dir"),
    "seed": ("random_seed",),
    "target_l0": ("l0_target", "target_sparsity"),
    "text_column": ("column", "column_name", "text_field"),
    "text_split": ("dataset_split", "split"),
    "text_subset": ("dataset_config", "data_args", "subset"),
    "tokens": ("epochs", "max_tokens", "n_tokens", "num_tokens", "steps", "total_tokens", "training_tokens"),
    "trust_remote_code": ("dataset_trust_remote_code",),
    "warmup_steps": ("lr_warm_up_steps", "lr_warmup_steps"),
}


def our_name(name: str, known: Iterable[str] = ()) -> str:
    """Return what we call what another library calls so; the name itself where none does.

    Args:
        name: theirs.
        known: settings that there are, of which one is preferred.
    """
    ours = [each for each, theirs in _ELSEWHERE.items() if name in theirs]
    known = set(known)
    return next((each for each in ours if each in known), next(iter(ours), name))


def near_setting(name: str, known: Iterable[str]) -> str:
    """Return the sentence that asks for the setting that may be meant, with a space before it; "" for none."""
    known = list(known)
    ours = our_name(name, known)
    return f" Did you mean {ours}?" if ours in known else did_you_mean(name, known, 0.6)
