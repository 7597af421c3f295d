"""Models in the published format, written by aihwkit-lightning itself."""

import dill
import torch
from tiny_models import tiny, token_ids


def lightning_config(tile_rows=-1, **changes):
    """As 'Analog Foundation Models' trains: static 8-bit inputs, 8-bit ADC by column."""
    from aihwkit_lightning.simulator.configs import (
        TorchInferenceRPUConfig,
        WeightClipType,
        WeightNoiseInjectionType,
    )

    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound = 14.0
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
    config.modifier.std_dev = 0.03
    config.mapping.max_input_size = tile_rows
    ranges = config.pre_post.input_range
    ranges.enable, ranges.init_from_data, ranges.init_std_alpha = True, 3, 6.0
    ranges.decay = 0.01
    for place, value in changes.items():
        *parts, name = place.split("__")
        holder = config
        for part in parts:
            holder = getattr(holder, part)
        assert hasattr(holder, name)
        setattr(holder, name, value)
    return config


def lightning_model(name="llama", config=None, *, tie=False, exclude=(), seed=0, **options):
    """A tiny model of aihwkit-lightning after a few batches of training, in evaluation mode."""
    from aihwkit_lightning.nn.conversion import convert_to_analog

    model = tiny(name, tie, seed=seed, **options)
    config = lightning_config() if config is None else config
    analog = convert_to_analog(model, config, exclude_modules=list(exclude)).train()
    with torch.no_grad():
        for batch in range(4):
            analog(token_ids(seed=batch))
    analog.apply_to_analog_layers(lambda layer: layer.clip_weights())
    return analog.eval()


def publish(model, config, directory, *, dump=dill.dumps, shards=1, index=True):
    """Write the directory as the published ones are; gives it."""
    import json

    directory.mkdir(parents=True)
    model.config.save_pretrained(directory)
    state = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(state), directory / "pytorch_model.bin")
    else:
        weight_map = {}
        for i in range(shards):
            name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
            part = dict(state[i::shards])
            torch.save(part, directory / name)
            weight_map |= dict.fromkeys(part, name)
        if index:
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (directory / "pytorch_model.bin.index.json").write_text(text)
    (directory / "rpu_config").write_bytes(dump(config))
    return directory
