"""The keys and values of an official LPO config, for tests."""

from configs.basic_config import basic_config


def get_config():
    """What differs from the defaults."""
    config = basic_config()
    config.sample.num_sample_each_step = 4
    config.train.beta = 500.0
    config.num_epochs = 5
    config.pretrained.model = "stabilityai/stable-diffusion-2-1-base"
    config.preference_model_func_cfg = dict(type="sd15_preference_model_func", ft_model_path="lrm_sd15",
                                            multi_scale=True, guidance_scale=7.5, multi_scale_cfg=False)
    config.compare_func_cfg = dict(type="preference_score_compare", threshold=0.3, dynamic_threshold="sigma",
                                   threshold_min=0.35, threshold_max=0.5)
    config.use_wandb = True
    config.run_name = f"lpo_sd21_{config.num_epochs}ep_beta{config.train.beta}"
    return config
