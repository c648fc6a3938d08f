"""A tiny Stable Diffusion as a single file: the names that its parts have in the original code."""

import re

import torch

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name, per_block, attending):
    """Of a UNet with ``per_block`` layers in a block: blocks and layers have one running number. ``attending``: the up
    blocks with attention, which comes before what makes them larger.
    """
    module, kind = name.rsplit(".", 1)
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    found = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", module)
    side, block, part, layer, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if part == "resnets":
        rest = RESNET[rest]
    if side == "mid":
        return f"middle_block.{2 * layer if part == 'resnets' else 1}.{rest}.{kind}"
    number = block * (per_block + 1) + layer + (side == "down")
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * (per_block + 1)}.0.op.{kind}"
    if part == "upsamplers":
        last = block * (per_block + 1) + per_block
        return f"output_blocks.{last}.{2 if block in attending else 1}.{rest}.{kind}"
    place = "input_blocks" if side == "down" else "output_blocks"
    return f"{place}.{number}.{0 if part == 'resnets' else 1}.{rest}.{kind}"


def vae_name(name, num_blocks):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    for side, sampler in (("down", "downsample"), ("up", "upsample")):
        turn = (lambda b: b) if side == "down" else (lambda b: num_blocks - 1 - b)
        name = re.sub(rf"{side}_blocks\.(\d)\.resnets", lambda m, s=side, t=turn: f"{s}.{t(int(m[1]))}.block", name)
        name = re.sub(
            rf"{side}_blocks\.(\d)\.{sampler}rs\.0",
            lambda m, s=side, a=sampler, t=turn: f"{s}.{t(int(m[1]))}.{a}",
            name,
        )
    return name


def original_state(pipeline):
    """{name: tensor} of a ``StableDiffusionPipeline``, as in files that people share."""
    config, state = pipeline.unet.config, {}
    attending = {block for block, kind in enumerate(config.up_block_types) if kind.startswith("CrossAttn")}
    for name, tensor in pipeline.unet.state_dict().items():
        state["model.diffusion_model." + unet_name(name, config.layers_per_block, attending)] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        key = vae_name(name, len(pipeline.vae.config.block_out_channels))
        one_by_one = ".attn_1." in key and key.endswith(".weight") and ".norm." not in key
        state["first_stage_model." + key] = tensor[:, :, None, None] if one_by_one else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        prefix = "" if name.startswith("text_model.") else "text_model."
        state[f"cond_stage_model.transformer.{prefix}{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()} | {"alphas_cumprod": torch.ones(1000)}
