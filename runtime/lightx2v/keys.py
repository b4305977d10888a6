"""Every key of LightX2V's configuration that concerns Wan text to video, and what becomes of it here.

A key is *used* (it becomes an option or a setting of the profile, or says what is so anyway), *moot* (it
changes nothing here, for the reason given), *nonstandard* (it can be tried), or *refused* (with it LightX2V
would make another picture, which this engine cannot). Keys and meanings are LightX2V's as of August 2026.
"""

from runtime.lightx2v import rules
from runtime.lightx2v.rules import (
    ANYTHING,
    COUNT,
    COUNTS,
    FLAG,
    LIST,
    NUMBER,
    OBJECT,
    PATH,
    PATH_OR_FALSE,
    SIZE,
    TEXT,
    Key,
    Rule,
    Wanted,
    fixed,
    missing,
    moot,
    option,
)

SCHEDULER = "WanStepDistillScheduler"
MODEL_CLASSES = ("wan2.1", "wan2.1_distill")

_BUILT = "so the model is built"
_LATER = moot("the memory plan decides: see `t2v plan`, --vram and --ram")
_NEITHER = moot("LightX2V does not use it for Wan either")
_TILES = moot("the memory plan decides; tiles are exact here and have no seams")
_LORA = missing("LoRA is not supported yet: merge it into the weights, or use distilled ones")
_RANDOM = missing("random weights draw nothing; `t2v --model demo` needs no download")

MODEL = {
    "model_cls": Key(TEXT, fixed(*MODEL_CLASSES, why="no other family runs here")),
    "task": Key(TEXT, fixed("t2v", why="only text to video is built here")),
    "model_path": Key(PATH, option("model", "the directory of the model")),
    "prompt": Key(TEXT, option("prompt")),
    "negative_prompt": Key(TEXT, rules.negative_prompt),
    "save_result_path": Key(PATH, option("output")),
    "seed": Key(COUNT, option("seed")),
}

SAMPLING = {
    "infer_steps": Key(COUNT, rules.infer_steps),
    "denoising_step_list": Key(COUNTS, rules.denoising_step_list),
    "sample_shift": Key(NUMBER, rules.sample_shift),
    "enable_cfg": Key(FLAG, rules.enable_cfg),
    "sample_guide_scale": Key(NUMBER, rules.guide_scale),
    "scheduler_type": Key(TEXT, fixed(SCHEDULER, why="the 4-step model is made for that one")),
    "distill_method": Key(TEXT, moot("what the weights are decides")),
    "changing_resolution": Key(FLAG, missing("lower resolution in early steps is not built here")),
    "enable_dynamic_cfg": Key(FLAG, missing("guidance as an input needs weights that this model has not")),
    "feature_caching": Key(TEXT, rules.feature_caching),
}

SIZES = {
    "target_height": Key(COUNT, option("height")),
    "target_width": Key(COUNT, option("width")),
    "target_video_length": Key(COUNT, option("frames")),
    "num_frames": Key(COUNT, option("frames")),
    "size": Key(SIZE, rules.both_sizes),
    "target_shape": Key(COUNTS, rules.target_shape),
    "fps": Key(COUNT, option("fps")),
    "text_len": Key(COUNT, rules.text_len),
    "vae_stride": Key(COUNTS, fixed((4, 8, 8), why=_BUILT)),
    "patch_size": Key(COUNTS, fixed((1, 2, 2), why=_BUILT)),
    "num_channels_latents": Key(COUNT, fixed(16, why=_BUILT)),
}

WEIGHTS = {
    "dit_quantized": Key(FLAG, rules.dit_quantized),
    "dit_quant_scheme": Key(TEXT, rules.dit_quant_scheme),
    "mm_config": Key(OBJECT, rules.dit_quant_scheme),
    "dit_quantized_ckpt": Key(PATH_OR_FALSE, rules.checkpoint("dit_quantized_ckpt")),
    "dit_original_ckpt": Key(PATH_OR_FALSE, rules.checkpoint("dit_original_ckpt")),
    "weight_auto_quant": Key(FLAG, missing("weights are not quantized at load: use an 8-bit variant")),
    "t5_quantized_ckpt": Key(PATH_OR_FALSE, rules.part_path("text encoder")),
    "t5_original_ckpt": Key(PATH_OR_FALSE, rules.part_path("text encoder")),
    "t5_tokenizer_path": Key(PATH_OR_FALSE, rules.part_path("tokenizer")),
    "vae_path": Key(PATH_OR_FALSE, rules.part_path("VAE")),
    "vae_name": Key(TEXT, fixed("Wan2.1_VAE", "Wan2.1_VAE.pth", why="the model has no other")),
    "vae_dtype": Key(TEXT, rules.vae_dtype),
    "vae_weight_dtype": Key(TEXT, moot("the VAE's weights have the dtype that it computes in (vae_dtype)")),
    "use_tae": Key(FLAG, missing("the tiny autoencoder draws other pictures and is not built here")),
    "use_lightvae": Key(FLAG, missing("the pruned VAE draws other pictures and is not built here")),
    "lora_configs": Key(LIST, _LORA),
    "lora_path": Key(ANYTHING, _LORA),
    "dummy_model": Key(FLAG, _RANDOM),
}

MEMORY = {
    "cpu_offload": Key(FLAG, rules.cpu_offload),
    "offload_granularity": Key(TEXT, moot("see cpu_offload")),
    "offload_plan": Key(OBJECT, moot("see cpu_offload")),
    "t5_cpu_offload": Key(FLAG, rules.offload("text_encoder")),
    "vae_cpu_offload": Key(FLAG, rules.offload("vae")),
    "t5_offload_granularity": Key(TEXT, _NEITHER),
    "offload_ratio": Key(NUMBER, _NEITHER),
    "lazy_load": Key(FLAG, _LATER),
    "t5_lazy_load": Key(FLAG, _LATER),
    "unload_modules": Key(FLAG, _LATER),
    "clean_cuda_cache": Key(FLAG, _LATER),
    "num_disk_workers": Key(COUNT, _LATER),
    "empty_cache_min_free_gib": Key(NUMBER, _LATER),
    "empty_cache_min_reclaimable_gib": Key(NUMBER, _LATER),
    "use_tiling_vae": Key(FLAG, _TILES),
    "use_stream_vae": Key(FLAG, moot("frames are always handed on as they are decoded")),
    "parallel": Key(OBJECT, rules.parallel),
}

AFTERWARDS = {
    "video_frame_interpolation": Key(ANYTHING, missing("frames are not interpolated here")),
    "video_super_resolution": Key(ANYTHING, missing("videos are not enlarged here")),
    "use_prompt_enhancer": Key(FLAG, missing("there is no prompt enhancer here: pass the finished prompt")),
}

# Many keys with one fate: type, what becomes of them, their names.
_KERNEL = moot("a choice of kernel: it changes speed and the last bits, and is made here by itself")
_HEADER = moot("what the text encoder's file holds is read from its header")
_CACHE = moot("of feature_caching")
_READ = moot("sizes are read from the tensors")
_MACHINERY = moot("of LightX2V's own machinery")
_OTHERS = moot("of other models than Wan2.1 text to video")
_INPUT = missing("only text to video is built here, so nothing goes in but a prompt")
GROUPS: tuple[tuple[Wanted, Rule, str], ...] = (
    (TEXT, _KERNEL, "self_attn_1_type cross_attn_1_type cross_attn_2_type attention_type"),
    (TEXT, _KERNEL, "modulate_type rope_type rms_norm_type layer_norm_type norm_modulate_backend"),
    (FLAG, _KERNEL, "rope_chunk rotary_chunk use_compile compile double_precision_rope"),
    (COUNT, _KERNEL, "rope_chunk_size rotary_chunk_size"),
    (FLAG, _HEADER, "t5_quantized"),
    (TEXT, _HEADER, "t5_quant_scheme"),
    (FLAG, moot("of lora_configs"), "lora_dynamic_apply"),
    (ANYTHING, moot("of use_tae"), "tae_path need_scaled"),
    (ANYTHING, moot("of use_prompt_enhancer"), "sub_servers"),
    (ANYTHING, moot("of changing_resolution"), "resolution_rate changing_resolution_steps"),
    (ANYTHING, moot("of enable_dynamic_cfg"), "cfg_scale"),
    (
        ANYTHING,
        _CACHE,
        "teacache_thresh coefficients use_ret_steps residual_diff_threshold",
    ),
    (ANYTHING, _CACHE, "magcache_calibration magcache_K magcache_thresh magcache_retention_ratio"),
    (ANYTHING, _CACHE, "magcache_ratios downsample_factor"),
    (ANYTHING, _READ, "_class_name _diffusers_version model_type dim ffn_dim freq_dim num_heads num_layers"),
    (ANYTHING, _READ, "in_dim out_dim text_dim eps"),
    (ANYTHING, _MACHINERY, "config_json load_from_rank0 warmup disagg_mode do_mm_calib"),
    (ANYTHING, _OTHERS, "clip_cpu_offload clip_quantized clip_quant_scheme clip_quantized_ckpt"),
    (ANYTHING, _OTHERS, "clip_original_ckpt use_image_encoder boundary boundary_step_index aspect_ratio"),
    (ANYTHING, _OTHERS, "resize_mode audio_fps distilled_sigma_values support_tasks sf_model_path sr_ratio"),
    (ANYTHING, _OTHERS, "low_noise_original_ckpt high_noise_original_ckpt low_noise_quantized_ckpt"),
    (ANYTHING, _OTHERS, "high_noise_quantized_ckpt skip_fp8_block_index transformer_model_name"),
    (ANYTHING, _OTHERS, "text_encoder_quant_scheme prompt_ref"),
    (ANYTHING, _INPUT, "image_path video_path last_frame_path audio_path action_path src_ref_images"),
    (ANYTHING, _INPUT, "src_video src_mask image_strength i2i_denoise_strength image_frame_idx"),
)

KEYS: dict[str, Key] = {
    **MODEL,
    **SAMPLING,
    **SIZES,
    **WEIGHTS,
    **MEMORY,
    **AFTERWARDS,
    **{name: Key(wanted, rule) for wanted, rule, names in GROUPS for name in names.split()},
}
