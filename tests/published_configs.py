"""The model parts of published YAMLs, from their parameters as facts.

`CONFIGS` maps the file's path in its project to the tree that reading the file gives. Values that all first
stages or all networks of a family share are written once; nothing is left out that a model depends on.
"""

IDENTITY = {"target": "torch.nn.Identity"}
_IMAGE = {"resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "num_res_blocks": 2, "dropout": 0.0}


def _ddconfig(double_z, z_channels, ch_mult, attn_resolutions=(), **more):
    return _IMAGE | {
        "double_z": double_z,
        "z_channels": z_channels,
        "ch_mult": list(ch_mult),
        "attn_resolutions": list(attn_resolutions),
        **more,
    }


KL_LOSS = {
    "target": "ldm.modules.losses.LPIPSWithDiscriminator",
    "params": {"disc_start": 50001, "kl_weight": 1e-6, "disc_weight": 0.5},
}
VQ_LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_conditional": False, "disc_in_channels": 3, "disc_weight": 0.75, "codebook_weight": 1.0},
}


def _part(target, **params):
    return {"target": target, "params": params}


def _kl(z, ch_mult, attn_resolutions=(), loss=KL_LOSS, project="ldm", **ddconfig):
    dd = _ddconfig(True, z, ch_mult, attn_resolutions, **ddconfig)
    return _part(
        f"{project}.models.autoencoder.AutoencoderKL",
        embed_dim=z,
        monitor="val/rec_loss",
        ddconfig=dd,
        lossconfig=loss,
    )


def _vq(z, n_embed, ch_mult, attn_resolutions=(), loss=VQ_LOSS, interface=False, monitor=True, **ddconfig):
    more = {"monitor": "val/rec_loss"} if monitor else {}
    return _part(
        "ldm.models.autoencoder." + ("VQModelInterface" if interface else "VQModel"),
        embed_dim=z,
        n_embed=n_embed,
        ddconfig=_ddconfig(False, z, ch_mult, attn_resolutions, **ddconfig),
        lossconfig=loss,
        **more,
    )


def _stage(part, **params):
    """A first stage inside a diffusion model: without its loss."""
    return {"target": part["target"], "params": part["params"] | {"lossconfig": IDENTITY} | params}


F4, F8, F8_VQ, F16, F32 = (1, 2, 4), (1, 2, 4, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 4)
KL_F4, KL_F8 = _kl(3, F4), _kl(4, F8)
KL_F16, KL_F32 = _kl(16, F16, [16]), _kl(64, F32, [16, 8])
VQ_F4_STAGE = _stage(_vq(3, 8192, F4, interface=True))
VQ_F8_STAGE = _stage(_vq(4, 16384, F8_VQ, [32], interface=True))


def _unet(channels, width, mult, attention, extra_in=0, **params):
    return _part(
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        in_channels=channels + extra_in,
        out_channels=channels,
        model_channels=width,
        attention_resolutions=list(attention),
        num_res_blocks=2,
        channel_mult=list(mult),
        **params,
    )


def _cross(context_dim, **params):
    return {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": context_dim} | params


def _ldm(unet, first_stage, cond, size, linear_end=0.0195, linear_start=0.0015, inpainting=False, **params):
    unet = {"target": unet["target"], "params": {"image_size": size} | unet["params"]}
    return _part(
        "ldm.models.diffusion.ddpm." + ("LatentInpaintDiffusion" if inpainting else "LatentDiffusion"),
        linear_start=linear_start,
        linear_end=linear_end,
        timesteps=1000,
        first_stage_key="image",
        image_size=size,
        channels=unet["params"]["out_channels"],
        log_every_t=200,
        monitor="val/loss_simple_ema",
        unet_config=unet,
        first_stage_config=first_stage,
        cond_stage_config=cond,
        **params,
    )


def _encoder(name, **params):
    return _part(f"ldm.modules.encoders.modules.{name}", **params)


def _faces(first_stage=VQ_F4_STAGE, **params):
    unet = _unet(3, 224, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32)
    return _ldm(unet, first_stage, "__is_unconditional__", 64, num_timesteps_cond=1, **params)


def _released_faces():
    return _faces(cond_stage_key="class_label", cond_stage_trainable=False, concat_mode=False)


def _imagenet_f8(first_stage=VQ_F8_STAGE):
    unet = _unet(4, 256, (1, 2, 4), (4, 2, 1), num_head_channels=32, **_cross(512))
    cond = _encoder("ClassEmbedder", embed_dim=512, key="class_label")
    more = {"cond_stage_key": "class_label", "cond_stage_trainable": True, "conditioning_key": "crossattn"}
    return _ldm(unet, first_stage, cond, 32, num_timesteps_cond=1, **more)


def _churches(first_stage):
    unet = _unet(
        4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), num_heads=8, use_scale_shift_norm=True, resblock_updown=True
    )
    scheduler = _part("ldm.lr_scheduler.LambdaLinearScheduler", warm_up_steps=[10000], f_start=[1e-6])
    more = {
        "cond_stage_key": "image",
        "cond_stage_trainable": False,
        "concat_mode": False,
        "scale_by_std": True,
    }
    return _ldm(
        unet,
        first_stage,
        "__is_unconditional__",
        32,
        linear_end=0.0155,
        loss_type="l1",
        scheduler_config=scheduler,
        num_timesteps_cond=1,
        **more,
    )


def _semantic(size):
    unet = _unet(3, 128, (1, 4, 8), (32, 16, 8), extra_in=3, num_heads=8)
    cond = _encoder("SpatialRescaler", n_stages=2, in_channels=182, out_channels=3)
    more = {
        "cond_stage_key": "segmentation",
        "concat_mode": True,
        "cond_stage_trainable": True,
        "loss_type": "l1",
    }
    return _ldm(unet, VQ_F4_STAGE, cond, size, linear_end=0.0205, **more)


def _text(unet, first_stage, cond, size, **params):
    more = {"cond_stage_key": "caption", "cond_stage_trainable": True, "conditioning_key": "crossattn"}
    return _ldm(unet, first_stage, cond, size, num_timesteps_cond=1, **(more | params))


def _inpainting():
    stage = _vq(3, 8192, F4, interface=True, attn_type="none")
    loss = {"target": "ldm.modules.losses.contperceptual.DummyLoss"}
    unet = _unet(3, 256, (1, 2, 3, 4), (8, 4, 2), extra_in=4, num_heads=8, resblock_updown=True)
    more = {"cond_stage_key": "masked_image", "concat_mode": True, "loss_type": "l1"}
    stage = _stage(stage, lossconfig=loss)
    return _ldm(unet, stage, "__is_first_stage__", 64, linear_end=0.0205, **more)


def _super_resolution():
    unet = _unet(3, 160, (1, 2, 2, 4), (16, 8), extra_in=3, num_head_channels=32)
    more = {
        "cond_stage_key": "LR_image",
        "concat_mode": True,
        "cond_stage_trainable": False,
        "loss_type": "l2",
    }
    return _ldm(unet, VQ_F4_STAGE, IDENTITY, 64, linear_end=0.0155, **more)


def _layout():
    unet = _unet(3, 128, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32, **_cross(512, transformer_depth=3))
    cond = _encoder(
        "BERTEmbedder", n_embed=512, n_layer=16, vocab_size=8192, max_seq_len=92, use_tokenizer=False
    )
    more = {
        "cond_stage_key": "coordinates_bbox",
        "conditioning_key": "crossattn",
        "cond_stage_trainable": True,
    }
    return _ldm(unet, VQ_F4_STAGE, cond, 64, linear_end=0.0205, loss_type="l1", **more)


def _retrieval():
    unet = _unet(16, 448, (1, 2, 3, 4), (4, 2, 1), num_head_channels=32, use_checkpoint=True, **_cross(768))
    more = {"cond_stage_key": "nix", "cond_stage_trainable": False, "conditioning_key": "crossattn"}
    more |= {"scale_by_std": False, "scale_factor": 0.22765929, "num_timesteps_cond": 1}
    return _ldm(unet, _stage(KL_F16), IDENTITY, 48, linear_end=0.015, **more)


_SD = {"linear_start": 0.00085, "linear_end": 0.012, "scale_factor": 0.18215, "use_ema": False}
_SD1_UNET = _unet(4, 320, F8, (4, 2, 1), num_heads=8, use_checkpoint=True, legacy=False, **_cross(768))
_SD1_STAGE = _stage(_kl(4, F8, resolution=512))


def _sd1(cond_params=None, **params):
    more = {"first_stage_key": "jpg", "cond_stage_key": "txt", "cond_stage_trainable": False}
    unet = {"target": _SD1_UNET["target"], "params": _SD1_UNET["params"] | params.pop("unet", {})}
    tree = _text(unet, _SD1_STAGE, _encoder("FrozenCLIPEmbedder"), 64, **_SD, **params)
    tree["params"] |= more
    return tree


def _sd2():
    heads = {"num_head_channels": 64, "use_linear_in_transformer": True, "use_fp16": True, "legacy": False}
    unet = _unet(4, 320, F8, (4, 2, 1), use_checkpoint=True, **heads, **_cross(1024))
    cond = _encoder("FrozenOpenCLIPEmbedder", freeze=True, layer="penultimate")
    tree = _text(unet, _stage(KL_F8), cond, 64, parameterization="v", **_SD)
    tree["params"] |= {"first_stage_key": "jpg", "cond_stage_key": "txt", "cond_stage_trainable": False}
    return tree


def _sd_inpainting():
    tree = _sd1(unet={"in_channels": 9})
    tree["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    tree["params"] |= {"conditioning_key": "hybrid", "finetune_keys": None}
    return tree


CONFIGS = {
    "configs/autoencoder/autoencoder_kl_64x64x3": KL_F4,
    "configs/autoencoder/autoencoder_kl_32x32x4": KL_F8,
    "configs/autoencoder/autoencoder_kl_16x16x16": KL_F16,
    "configs/autoencoder/autoencoder_kl_8x8x64": KL_F32,
    "configs/latent-diffusion/celebahq-ldm-vq-4": _faces(
        _stage(VQ_F4_STAGE, ckpt_path="models/first_stage_models/vq-f4/model.ckpt")
    ),
    "configs/latent-diffusion/ffhq-ldm-vq-4": _faces(
        _stage(VQ_F4_STAGE, ckpt_path="configs/first_stage_models/vq-f4/model.yaml")
    ),
    "configs/latent-diffusion/lsun_bedrooms-ldm-vq-4": _faces(
        _stage(VQ_F4_STAGE, ckpt_path="configs/first_stage_models/vq-f4/model.yaml")
    ),
    "configs/latent-diffusion/lsun_churches-ldm-kl-8": _churches(
        _stage(KL_F8, ckpt_path="models/first_stage_models/kl-f8/model.ckpt")
    ),
    "configs/latent-diffusion/cin-ldm-vq-f8": _imagenet_f8(
        _stage(VQ_F8_STAGE, ckpt_path="configs/first_stage_models/vq-f8/model.yaml")
    ),
    "configs/latent-diffusion/cin256-v2": _text(
        _unet(3, 192, (1, 2, 3, 5), (8, 4, 2), num_heads=1, **_cross(512)),
        VQ_F4_STAGE,
        _encoder("ClassEmbedder", n_classes=1001, embed_dim=512, key="class_label"),
        64,
        cond_stage_key="class_label",
        use_ema=False,
    ),
    "configs/latent-diffusion/txt2img-1p4B-eval": _text(
        _unet(4, 320, F8, (4, 2, 1), num_heads=8, use_checkpoint=True, legacy=False, **_cross(1280)),
        _stage(KL_F8),
        _encoder("BERTEmbedder", n_embed=1280, n_layer=32),
        32,
        **_SD,
    ),
    "configs/retrieval-augmented-diffusion/768x768": _retrieval(),
    "models/first_stage_models/kl-f4/config": KL_F4,
    "models/first_stage_models/kl-f8/config": KL_F8,
    "models/first_stage_models/kl-f16/config": KL_F16,
    "models/first_stage_models/kl-f32/config": KL_F32,
    "models/first_stage_models/vq-f4/config": _vq(3, 8192, F4),
    "models/first_stage_models/vq-f4-noattn/config": _vq(3, 8192, F4, attn_type="none"),
    "models/first_stage_models/vq-f8/config": _vq(4, 16384, F8_VQ, [32]),
    "models/first_stage_models/vq-f8-n256/config": _vq(4, 256, F8_VQ, [32]),
    "models/first_stage_models/vq-f16/config": _vq(8, 16384, F16, [16], monitor=False),
    "models/ldm/celeba256/config": _released_faces(),
    "models/ldm/ffhq256/config": _released_faces(),
    "models/ldm/lsun_beds256/config": _released_faces(),
    "models/ldm/lsun_churches256/config": _churches(_stage(KL_F8)),
    "models/ldm/cin256/config": _imagenet_f8(),
    "models/ldm/bsr_sr/config": _super_resolution(),
    "models/ldm/inpainting_big/config": _inpainting(),
    "models/ldm/layout2img-openimages256/config": _layout(),
    "models/ldm/semantic_synthesis256/config": _semantic(64),
    "models/ldm/semantic_synthesis512/config": _semantic(128),
    "models/ldm/text2img256/config": _text(
        _unet(3, 192, (1, 2, 3, 5), (8, 4, 2), num_head_channels=32, **_cross(640)),
        VQ_F4_STAGE,
        _encoder("BERTEmbedder", n_embed=640, n_layer=32),
        64,
    ),
}

STABLE_DIFFUSION = {
    "stable-diffusion/v1-inference": _sd1(),
    "stable-diffusion/v1-inpainting-inference": _sd_inpainting(),
    "stable-diffusion/v2-inference-v": _sd2(),
}

# sgm

_SGM_UNET = "sgm.modules.diffusionmodules.openaimodel.UNetModel"


def _sgm_embedder(name, key, **params):
    return {"is_trainable": False, "input_key": key} | _part(f"sgm.modules.encoders.modules.{name}", **params)


def _engine(unet, embedders, scale, scaling="EpsScaling", **ddconfig):
    modules = "sgm.modules.diffusionmodules."
    denoiser = _part(
        modules + "denoiser.DiscreteDenoiser",
        num_idx=1000,
        scaling_config={"target": modules + f"denoiser_scaling.{scaling}"},
        discretization_config={"target": modules + "discretizer.LegacyDDPMDiscretization"},
    )
    return _part(
        "sgm.models.diffusion.DiffusionEngine",
        scale_factor=scale,
        disable_first_stage_autocast=True,
        denoiser_config=denoiser,
        network_config=unet,
        conditioner_config=_part("sgm.modules.GeneralConditioner", emb_models=embedders),
        first_stage_config=_kl(4, F8, loss=IDENTITY, project="sgm", **ddconfig),
    )


def _sgm_unet(width, mult, attention, depth, context_dim, **params):
    return _part(
        _SGM_UNET,
        use_checkpoint=True,
        in_channels=4,
        out_channels=4,
        model_channels=width,
        attention_resolutions=list(attention),
        num_res_blocks=2,
        channel_mult=list(mult),
        num_head_channels=64,
        transformer_depth=depth,
        context_dim=context_dim,
        **({"use_linear_in_transformer": True} | params),
    )


def _sequential(length):
    return {
        "adm_in_channels": length,
        "num_classes": "sequential",
        "spatial_transformer_attn_type": "softmax-xformers",
    }


_OPEN_CLIP = _sgm_embedder("FrozenOpenCLIPEmbedder", "txt", freeze=True, layer="penultimate")
_BIG_G = _sgm_embedder(
    "FrozenOpenCLIPEmbedder2",
    "txt",
    arch="ViT-bigG-14",
    version="laion2b_s39b_b160k",
    freeze=True,
    layer="penultimate",
    always_return_pooled=True,
    legacy=False,
)
_CLIP_L = _sgm_embedder("FrozenCLIPEmbedder", "txt", layer="hidden", layer_idx=11)


def _sizes(*keys):
    return [_sgm_embedder("ConcatTimestepEmbedderND", key, outdim=256) for key in keys]


_SD2_UNET = _sgm_unet(320, F8, (4, 2, 1), 1, 1024)
SGM = {
    "configs/inference/sd_2_1": _engine(_SD2_UNET, [_OPEN_CLIP], 0.18215),
    "configs/inference/sd_2_1_768": _engine(_SD2_UNET, [_OPEN_CLIP], 0.18215, "VScaling"),
    "configs/inference/sd_xl_base": _engine(
        _sgm_unet(320, F4, (4, 2), [1, 2, 10], 2048, **_sequential(2816)),
        [_CLIP_L, _BIG_G, *_sizes("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")],
        0.13025,
        attn_type="vanilla-xformers",
    ),
    "configs/inference/sd_xl_refiner": _engine(
        _sgm_unet(384, F8, (4, 2), 4, [1280] * 4, **_sequential(2560)),
        [_BIG_G, *_sizes("original_size_as_tuple", "crop_coords_top_left", "aesthetic_score")],
        0.13025,
        attn_type="vanilla-xformers",
    ),
}
