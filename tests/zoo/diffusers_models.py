"""The denoisers of diffusers, tiny, with the settings that change their structure."""

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet1DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from models import Denoiser, tiny_unet

TIMES = (5, 900)


def _images(channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def unet(**settings: Any) -> Denoiser:
    """A UNet2DModel with attention at the lower resolution."""
    labels = {"timestep": [7, 40], "identity": torch.randn(2, 64)}.get(settings.get("class_embed_type", ""), [3, 1])
    conditional = "num_class_embeds" in settings or "class_embed_type" in settings
    kwargs = {"class_labels": torch.as_tensor(labels)} if conditional else {}
    return Denoiser(tiny_unet(**settings), (_images(), torch.tensor(TIMES)), kwargs)


def unet_without_attention(**settings: Any) -> Denoiser:
    """The same without attention."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return unet(**{**blocks, "add_attention": False, **settings})


def unet_with_resnets_for_sampling() -> Denoiser:
    """The blocks that halve and double the resolution with residual blocks, as ADM does."""
    return unet(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    )


def unet_with_fir_skips() -> Denoiser:
    """NCSN++ with FIR resampling and image skips; its norms have min(channels // 4, 32) groups."""
    return unet(
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        block_out_channels=(32, 64),
        norm_num_groups=32,
        time_embedding_type="fourier",
    )


def conditional_unet(**settings: Any) -> Denoiser:
    """A UNet2DConditionModel: self- and cross-attention, GEGLU."""
    common: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,  # the number of heads, by a mistake that diffusers has kept
        "norm_num_groups": 8,
    }
    network = UNet2DConditionModel(**{**common, **settings})
    kwargs: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 5, 24)}
    if settings.get("addition_embed_type") == "text_time":
        kwargs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 20), "time_ids": torch.rand(2, 6)}
    if settings.get("class_embed_type") == "projection":
        kwargs["class_labels"] = torch.randn(2, 12)
    if "num_class_embeds" in settings:
        kwargs["class_labels"] = torch.tensor([3, 1])
    return Denoiser(network, (_images(4), torch.tensor(TIMES)), kwargs)


def sdxl_unet() -> Denoiser:
    """As SDXL: linear projections, two transformer layers, text and size embeddings."""
    return conditional_unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
        transformer_layers_per_block=(1, 2),
    )


def dit() -> Denoiser:
    """DiT with class labels and two heads; predicts noise and variance."""
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=8,
    )  # fmt: skip
    return Denoiser(network, (_images(4), torch.tensor(TIMES)), {"class_labels": torch.tensor([3, 1])})


def sd3(**settings: Any) -> Denoiser:
    """SD3: two streams that attend jointly."""
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=8, **settings,
    )  # fmt: skip
    kwargs = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor(TIMES),
    }
    return Denoiser(network, (_images(4),), kwargs)


def pixart(**settings: Any) -> Denoiser:
    """PixArt: cross-attention to captions, one modulation for all blocks."""
    network = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=24, caption_channels=12, norm_num_groups=8, **settings,
    )  # fmt: skip
    extra = {"resolution": torch.rand(2, 2), "aspect_ratio": torch.rand(2, 1)}
    kwargs = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor(TIMES),
        "added_cond_kwargs": extra if settings.get("use_additional_conditions") else {},
    }
    return Denoiser(network, (_images(4),), kwargs)


def pixart_sigma() -> Denoiser:
    """PixArt-Sigma masks its captions."""
    found = pixart(use_additional_conditions=False)
    found.kwargs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return found


def flux() -> Denoiser:
    """Flux: two streams, then one; rotary positions."""
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    kwargs = {
        "hidden_states": torch.randn(2, 6, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": torch.rand(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return Denoiser(network, (), kwargs)


def wan() -> Denoiser:
    """Wan: video, rotary positions, queries normalised across heads."""
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    kwargs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "timestep": torch.tensor(TIMES),
        "encoder_hidden_states": torch.randn(2, 5, 10),
    }
    return Denoiser(network, (), kwargs)


def lumina() -> Denoiser:
    """Lumina 2: grouped queries, rotary positions."""
    network = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(16, 16, 16),
        cap_feat_dim=10,
    )  # fmt: skip
    kwargs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([0.1, 0.9]),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    return Denoiser(network, (), kwargs)


def unet_1d() -> Denoiser:
    """Dance Diffusion's U-Net for sound: Fourier time embedding as extra input channels, self-attention."""
    network = UNet1DModel(
        sample_size=64, extra_in_channels=64, block_out_channels=(32, 32, 64), in_channels=2, out_channels=2
    )
    return Denoiser(network, (torch.randn(2, 2, 64), torch.tensor(TIMES)))


def unet_1d_rl() -> Denoiser:
    """Janner's U-Net for trajectories: residual temporal blocks with a time embedding."""
    network = UNet1DModel(
        sample_size=16, in_channels=6, out_channels=6, block_out_channels=(16, 32), layers_per_block=1,
        use_timestep_embedding=True, time_embedding_type="positional", flip_sin_to_cos=False, freq_shift=1,
        down_block_types=("DownResnetBlock1D",) * 2, up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", act_fn="mish",
        downsample_each_block=False,
    )  # fmt: skip
    return Denoiser(network, (torch.randn(2, 6, 16), torch.tensor(TIMES)))


DIFFUSERS = {
    "UNet2D": unet,
    "UNet2D, no attention": unet_without_attention,
    "UNet2D, one head": lambda: unet(attention_head_dim=None),
    "UNet2D, class labels": lambda: unet(num_class_embeds=10),
    "UNet2D, class timesteps": lambda: unet_without_attention(class_embed_type="timestep"),
    "UNet2D, class embeddings": lambda: unet_without_attention(class_embed_type="identity"),
    "UNet2D, scale and shift": lambda: unet(resnet_time_scale_shift="scale_shift"),
    "UNet2D, resnet sampling": unet_with_resnets_for_sampling,
    "UNet2D, resnet resampling only": lambda: unet(downsample_type="resnet", upsample_type="resnet"),
    "UNet2D, FIR skips": unet_with_fir_skips,
    "UNet2D, Fourier time": lambda: unet_without_attention(time_embedding_type="fourier"),
    "UNet2D, learned time": lambda: unet_without_attention(time_embedding_type="learned", num_train_timesteps=1000),
    "UNet2D, centred input": lambda: unet_without_attention(center_input_sample=True),
    "UNet2DCondition": conditional_unet,
    "UNet2DCondition, SDXL": sdxl_unet,
    "UNet2DCondition, cross only": lambda: conditional_unet(only_cross_attention=True),
    "UNet2DCondition, projected class": lambda: conditional_unet(
        class_embed_type="projection", projection_class_embeddings_input_dim=12
    ),
    "UNet2DCondition, class concatenated": lambda: conditional_unet(
        num_class_embeds=10, class_embeddings_concat=True, resnet_time_scale_shift="scale_shift"
    ),
    "DiT": dit,
    "SD3": sd3,
    "SD3.5, dual attention": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "PixArt-alpha": lambda: pixart(use_additional_conditions=True),
    "PixArt-sigma": pixart_sigma,
    "Flux": flux,
    "Wan": wan,
    "Lumina 2": lumina,
    "UNet1D": unet_1d,
    "UNet1D, trajectories": unet_1d_rl,
}
