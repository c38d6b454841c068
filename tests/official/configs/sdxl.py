"""The keys and values of an official LPO config, for tests."""

from configs.basic_config import basic_config


def get_config():
    """What differs from the defaults."""
    config = basic_config()
    config.sample.num_sample_each_step = 4
    config.train.beta = 500.0
    config.num_epochs = 5
    config.pretrained.model = "stabilityai/stable-diffusion-xl-base-1.0"
    config.pretrained.vae_model_name_or_path = "madebyollin/sdxl-vae-fp16-fix"
    config.lora_rank = 64
    config.use_checkpointing = True
    config.sample.sample_batch_size = 4
    config.sample.num_inner_step = 0
    config.sample.inner_start_step = 0
    config.train.train_batch_size = 4
    config.train.learning_rate = 1e-5
    config.preference_model_func_cfg = dict(type="sdxl_preference_model_func", ft_model_path="lrm_sdxl",
                                            multi_scale=True, guidance_scale=7.5, multi_scale_cfg=False)
    config.compare_func_cfg = dict(type="preference_score_compare", threshold=0.6, dynamic_threshold="sigma",
                                   threshold_min=0.45, threshold_max=0.6)
    config.use_wandb = True
    config.run_name = f"lpo_sdxl_{config.num_epochs}ep_beta{config.train.beta}"
    return config
