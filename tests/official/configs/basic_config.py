"""The keys and values of the official basic config, for tests."""

import ml_collections


def basic_config():
    """Every default."""
    return ml_collections.ConfigDict({
        "seed": 42, "num_checkpoint_limit": None, "allow_tf32": True,
        "use_xformers": True, "use_checkpointing": False, "use_wandb": False,
        "pretrained": {"model": "sd-legacy/stable-diffusion-v1-5"}, "use_lora": True, "lora_rank": 4,
        "dynamic_beta": False, "compare_func_cfg": {"type": "preference_score_compare", "threshold": 0.3},
        "dataset_cfg": {"type": "PromptDataset", "meta_json_path": "prompts/4k_training_prompts.json",
                        "pretrained_tokenzier_path": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
        "dataloader_num_workers": 16, "dataloader_shuffle": True, "dataloader_pin_memory": True,
        "dataloader_drop_last": False, "num_epochs": 10, "resume_from": "",
        "sample": {"num_steps": 20, "eta": 1.0, "guidance_scale": 5.0,
                   "sample_batch_size": 5, "num_sample_each_step": 2},
        "train": {"train_batch_size": 10, "use_8bit_adam": False, "learning_rate": 6e-5, "adam_beta1": 0.9,
                  "adam_beta2": 0.999, "adam_weight_decay": 1e-4, "adam_epsilon": 1e-8,
                  "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "cfg": True,
                  "divert_start_step": 0, "divert_end_step": 0, "beta": 10.0, "eps": 0.1},
        "validation_prompts": ["A beautiful lake", "A photo of an astronaut riding a horse on mars",
                               "A cat jumps on a dog"], "num_validation_images": 2, "eval_interval": 1,
        "run_name": "test", "wandb_project_name": "lpo", "wandb_entity_name": None, "logdir": "logs/lpo",
        "save_interval": 1})
