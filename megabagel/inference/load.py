"""From a BAGEL folder or a checkpoint of ours to a model in use, split by tensors over processes of the launch."""

import dataclasses
from pathlib import Path

import torch
from megatron.core import parallel_state

from megabagel.checkpoint.export_plan import read_config
from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.checkpoint.torch_dist import checkpoint_folder
from megabagel.config.checks import check_layout
from megabagel.config.errors import ConfigError
from megabagel.config.folder import is_checkpoint, read_model_config
from megabagel.config.paths import autoencoder_path, tokenizer_path
from megabagel.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megabagel.data.text import Tokenizer
from megabagel.inference.generator import Generator
from megabagel.inference.network import Network
from megabagel.models.autoencoder import load_autoencoder
from megabagel.models.build import DTYPES, build_stages
from megabagel.packing.geometry import geometry_of
from megabagel.runtime.distributed import initialize, world_size


def load(
    folder: str | Path,
    *,
    load_ema: bool = True,
    dtype: str | None = None,
    tokenizer: str | None = None,
    autoencoder: str | None = None,
    tensor_parallel: int | None = None,
) -> Generator:
    """The model in `folder`: a BAGEL folder, a run folder (its newest checkpoint) or an iter_... folder.

    `load_ema`: the moving average where there is one. `dtype`: bf16 or fp32; by default bf16 on a GPU, fp32 on a CPU,
    where bf16 is slower. `tokenizer`, `autoencoder`: folders, by default those that the model was trained with.
    `tensor_parallel`: processes that share a copy of the model, by default all of the launch.
    Raises ConfigError, CheckpointError, DataError or AutoencoderError in one sentence.
    """
    config = inference_config(Path(folder), load_ema, dtype, tokenizer, autoencoder, tensor_parallel)
    if not parallel_state.model_parallel_is_initialized():
        initialize(config.parallel, config.training.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    words = Tokenizer(tokenizer_path(config))
    try:
        geometry = geometry_of(config.model, words.special)
    except ValueError as error:
        raise ConfigError(f"{words.folder} does not belong to {folder}: {error}.") from None
    (stage,) = build_stages(config, device)
    source = open_source(config)
    load_weights([stage], source)
    source.close()
    stage.eval().requires_grad_(False)
    images = None
    if config.model.visual_gen:
        images = load_autoencoder(autoencoder_path(config)).to(device, DTYPES[config.training.params_dtype])
    return Generator(Network(stage, geometry), words, images)


def inference_config(
    folder: Path,
    load_ema: bool,
    dtype: str | None,
    tokenizer: str | None,
    autoencoder: str | None,
    tensor_parallel: int | None = None,
) -> Config:
    """The configuration that builds the model in `folder`; see `load`."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; give a BAGEL folder, a run folder or an iter_... folder.")
    if is_checkpoint(folder):
        trained = read_config(checkpoint_folder(folder))
        model = trained.model
        tokenizer, autoencoder = tokenizer or tokenizer_path(trained), autoencoder or autoencoder_path(trained)
        for name, path in (("tokenizer", tokenizer), ("autoencoder", autoencoder if model.visual_gen else ".")):
            if path is None or not Path(path).exists():
                raise ConfigError(f"the {name} of {folder} was at {path}, which is not there; give --{name} FOLDER.")
    else:
        model = read_model_config(str(folder), ModelConfig())
    split = tensor_parallel or world_size()
    config = Config(
        model=dataclasses.replace(model, freeze_llm=False, freeze_vit=False, freeze_und=False),
        parallel=ParallelConfig(tensor_model_parallel_size=split),
        data=DataConfig(tokenizer=tokenizer),
        training=TrainingConfig(
            global_batch_size=max(1, world_size() // split),  # nothing is trained, but every copy would get its share
            params_dtype=dtype or ("bf16" if torch.cuda.is_available() else "fp32"),
        ),
        # Transformer Engine's linears want rows, also for a stream that is empty
        kernels=KernelConfig(transformer_impl="local"),
        checkpoint=CheckpointConfig(init_from=str(folder), load_ema=load_ema, init_vae=autoencoder),
    )
    check_layout(config, world_size())
    return config
