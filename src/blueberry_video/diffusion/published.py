"""Published weights of any diffusion transformer: into a model, and out of it as a folder that diffusers loads."""

import shutil
from pathlib import Path

from torch import nn

from blueberry_video.diffusion.lora import FILE, load_adapters, plain, save_adapters
from blueberry_video.diffusion.text_to_video import TextToVideo
from blueberry_video.models.cogvideox import model as cogvideox
from blueberry_video.models.hunyuan_video import model as hunyuan_video
from blueberry_video.models.hunyuan_video import model_15 as hunyuan_video15
from blueberry_video.weights.files import read_content


def load_weights(model: TextToVideo, path: str | Path) -> str:
    """Puts weights into a model: into its transformer a folder of diffusers or an original file, adapters that were
    saved beside one, or all of a checkpoint of an own run.

    Returns:
        One sentence on what was loaded.

    Raises:
        FileNotFoundError: something is missing there.
        ValueError: the weights are of another model or variant, which is named.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        return _load_own(model, path)
    if path.name == FILE:
        if model.lora is None:
            raise ValueError(
                f"{path} holds adapters, and the model has none: set model.lora, with its rank and targets."
            )
        load_adapters(model.transformer, model.lora, path)
        return f"loaded the adapters from {path}"
    with plain(model.transformer) as transformer:
        match transformer:
            case cogvideox.CogVideoX():
                cogvideox.load_published(transformer, path)
                return f"loaded {cogvideox.variant(transformer)} from {path}"
            case hunyuan_video.HunyuanVideo():
                return hunyuan_video.load_published(transformer, path)
            case hunyuan_video15.HunyuanVideo15():
                return hunyuan_video15.load_published(transformer, path)
            case _:
                raise ValueError(f"{type(transformer).__name__} has no published weights: leave init_from null.")


def save_transformer(transformer: nn.Module, folder: str | Path) -> None:
    """Writes ``folder``, which diffusers' ``from_pretrained`` loads; until it is whole, nothing is there.

    Raises:
        FileExistsError: there is something already.
        ValueError: diffusers has no such transformer.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: choose another folder, or remove it.")
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
    match transformer:
        case cogvideox.CogVideoX():
            cogvideox.save_published(transformer, aside)
        case hunyuan_video.HunyuanVideo():
            hunyuan_video.save_published(transformer, aside)
        case hunyuan_video15.HunyuanVideo15():
            hunyuan_video15.save_published(transformer, aside)
        case _:
            raise ValueError(f"{type(transformer).__name__} is none that diffusers knows.")
    aside.replace(folder)


def export(model: TextToVideo, folder: str | Path, merge: bool = False) -> list[Path]:
    """Writes what a model has learned under ``folder``: ``transformer/``; or, of a model with adapters, their file
    alone, unless they are to be merged into the transformer.

    Returns:
        What was written.

    Raises:
        FileExistsError, ValueError: see :func:`save_transformer`.
    """
    folder = Path(folder)
    if model.lora is not None and not merge:
        if (folder / FILE).exists():
            raise FileExistsError(f"{folder / FILE} is there already: choose another folder, or remove it.")
        return [save_adapters(model.transformer, model.lora, folder)]
    with plain(model.transformer, merged=True) as transformer:
        save_transformer(transformer, folder / "transformer")
    return [folder / "transformer"]


def _load_own(model: TextToVideo, path: Path) -> str:
    content = read_content(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of a run: it has no state_dict.")
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    own = model.state_dict()
    shapes, theirs = ({name: value.shape for name, value in tensors.items()} for tensors in (own, weights))
    others = sorted(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name))
    if others:
        raise ValueError(
            f"the checkpoint {path} is of another model: {len(others)} tensors are missing, left over or of another "
            f"shape, such as {others[0]}. Choose the model it was trained with."
        )
    model.load_state_dict(weights)
    return f"loaded {len(weights)} tensors from {path}"
