"""Stable Diffusion's UNet, Flux and SD3 in 4 bits, and LoRA on their linear and convolution layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from qlora_ext import Linear4bit, quantize_model
from qlora_ext.interop.diffusers import NF4Config
from qlora_ext.interop.peft import LoraLinear4bit

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "ff.net.0.proj"]


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=32,
        norm_num_groups=16,
    )


def flux() -> FluxTransformer2DModel:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4}
    widths = {"in_channels": 16, "joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": (8, 12, 12)}
    return FluxTransformer2DModel(patch_size=1, guidance_embeds=True, **sizes, **widths)


def sd3() -> SD3Transformer2DModel:
    sizes = {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4, "caption_projection_dim": 128}
    widths = {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    return SD3Transformer2DModel(sample_size=8, patch_size=2, pos_embed_max_size=8, **sizes, **widths)


def inputs(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(model.dtype)

    given = {"encoder_hidden_states": normal(2, 5, 64), "timestep": torch.tensor([3, 700])}
    if isinstance(model, UNet2DConditionModel):
        return given | {"sample": normal(2, 4, 8, 8)}
    given["pooled_projections"] = normal(2, 64)
    if isinstance(model, SD3Transformer2DModel):
        return given | {"hidden_states": normal(2, 4, 8, 8)}
    guidance, ids = torch.full((2,), 3.5), {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return given | ids | {"hidden_states": normal(2, 16, 16), "guidance": guidance.to(model.dtype)}


@torch.no_grad()
def output(model: Any) -> Tensor:
    return model.eval()(**inputs(model), return_dict=False)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("diffusers")
    for make in (unet, flux, sd3):
        make().save_pretrained(root / make.__name__, max_shard_size="300KB")
    return root


@pytest.mark.parametrize("options", [{}, {"double_quant": False, "quant_type": "fp4"}], ids=["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [unet, flux, sd3])
def test_from_pretrained_is_quantize_model_and_comes_back_from_its_files(
    make: Any, dtype: torch.dtype, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    kind, source = type(make()), folder / make.__name__
    plain = quantize_model(kind.from_pretrained(source, torch_dtype=dtype), **options)
    model = kind.from_pretrained(source, torch_dtype=dtype, quantization_config=NF4Config(**options))
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) > 10
    assert torch.equal(output(model), output(plain))
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    again = kind.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    assert again.config.quantization_config.quant_type == options.get("quant_type", "nf4")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(output(again), output(model))


def test_dequantize_gives_a_model_that_saves_as_an_ordinary_one(folder: Path, tmp_path: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(folder / "unet", quantization_config=NF4Config())
    expected = output(model)
    dense = model.dequantize()
    assert not any(isinstance(m, Linear4bit) for m in dense.modules())
    torch.testing.assert_close(output(dense), expected, rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path)
    assert torch.equal(output(UNet2DConditionModel.from_pretrained(tmp_path)), output(dense))


def train(model: Any, steps: int = 20) -> list[float]:
    """Diffusers' own loss: of the noise that the model predicts."""
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    draw = torch.Generator().manual_seed(5)
    latents, text = torch.randn(4, 4, 8, 8, generator=draw), torch.randn(4, 5, 64, generator=draw)
    noise, times = torch.randn(4, 4, 8, 8, generator=draw), torch.tensor([10, 200, 500, 900])
    noisy = scheduler.add_noise(latents, noise, times)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(noisy, times, text).sample, noise)
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def dense_twin(source: Path, model: nn.Module) -> UNet2DConditionModel:
    """The unquantized model with the weights that the 4-bit one stands for."""
    dense = UNet2DConditionModel.from_pretrained(source)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            dense.get_submodule(name.replace(".base_layer", "")).weight.data.copy_(layer.dequantize())
    return dense


@pytest.mark.parametrize("loaded", [True, False], ids=["from_pretrained", "quantize_model"])
def test_lora_on_linear_and_convolution_layers(loaded: bool, folder: Path, tmp_path: Path) -> None:
    source = folder / "unet"
    config = {"quantization_config": NF4Config()} if loaded else {}
    model = UNet2DConditionModel.from_pretrained(source, **config)
    if not loaded:
        quantize_model(model)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    wrapped = [type(m.get_base_layer()) for m in model.modules() if hasattr(m, "lora_A")]
    assert wrapped.count(nn.Conv2d) > 5
    assert wrapped.count(Linear4bit) == sum(isinstance(m, LoraLinear4bit) for m in model.modules()) > 10
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0], losses
    expected = output(model)

    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=dense_twin(source, model), scheduler=DDPMScheduler(steps_offset=1), requires_safety_checker=False, **parts
    )
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-4, atol=1e-5)


def test_a_flux_pipeline_loads_an_adapter_onto_4_bits(folder: Path, tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(folder / "flux", quantization_config=NF4Config())
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False)
    )
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    fresh = FluxTransformer2DModel.from_pretrained(folder / "flux", quantization_config=NF4Config())
    before = output(fresh)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=fresh, **parts)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(output(pipe.transformer), output(model))
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.transformer), before)


@pytest.mark.parametrize(
    "options", [{"quant_type": "nf5"}, {"blocksize": 48}, {"bits": 4}, {"modules_to_not_convert": "proj_out"}]
)
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"nf5|48|bits|proj_out"):
        NF4Config(**options)
