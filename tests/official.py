"""The official script's flags."""

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d"]

# The flags of Diffusers' train_text_to_image.py and their defaults.
OFFICIAL_DEFAULTS = {
    "input_perturbation": 0, "revision": None, "variant": None, "dataset_name": None, "dataset_config_name": None,
    "image_column": "image", "caption_column": "text", "max_train_samples": None, "validation_prompts": None,
    "output_dir": "sd-model-finetuned", "cache_dir": None, "seed": None, "resolution": 512, "center_crop": False,
    "random_flip": False, "train_batch_size": 16, "num_train_epochs": 100, "max_train_steps": None,
    "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-4, "scale_lr": False,
    "lr_scheduler": "constant", "lr_warmup_steps": 500, "snr_gamma": None, "dream_training": False,
    "dream_detail_preservation": 1.0, "use_8bit_adam": False, "allow_tf32": False, "use_ema": False,
    "offload_ema": False, "foreach_ema": False, "non_ema_revision": None, "dataloader_num_workers": 0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
    "push_to_hub": False, "hub_token": None, "prediction_type": None, "hub_model_id": None, "logging_dir": "logs",
    "mixed_precision": None, "report_to": "tensorboard", "local_rank": -1, "checkpointing_steps": 500,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None,
    "enable_xformers_memory_efficient_attention": False, "noise_offset": 0, "validation_epochs": 5,
    "tracker_project_name": "text2image-fine-tune", "image_interpolation_mode": "lanczos",
}  # fmt: skip
