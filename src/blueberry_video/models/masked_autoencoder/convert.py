"""Conversion of weights of VideoMAE (original and transformers) and OmniMAE to the names of this package and back."""

from pathlib import Path

from torch import Tensor

from blueberry_video.models import vit


def convert_published(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Converts a pre-trained state dict in any layout to the names of
    :class:`~blueberry_video.models.masked_autoencoder.MaskedAutoencoder`.

    Args:
        state: tensors by name.
        source: origin of the weights, for the error message.

    Raises:
        ValueError: there is no decoder, as in fine-tuned models, or positions differ from the computed ones.
    """
    if any(name.startswith("trunk.") for name in state):
        state = convert_omnimae(state)
    elif any(name.startswith("videomae.") for name in state):
        state = convert_huggingface(state)
    if "encoder_to_decoder.weight" not in state:
        raise ValueError(
            f"{source} holds no decoder of VideoMAE (encoder_to_decoder.weight is missing) or OmniMAE "
            "(trunk.decoder.decoder_embed.weight), as fine-tuned models: load it with "
            "blueberry_video.models.classifier.VideoClassifier.from_published, or use init_from for its encoder."
        )
    return state


def convert_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy: the names of the original VideoMAE and VideoMAE V2 are those of this package."""
    return dict(state)


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`convert_original`.

    Raises:
        ValueError: the weights are those of an OmniMAE.
    """
    _check_is_videomae(state)
    return dict(state)


def convert_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the weights of transformers' ``VideoMAEForPreTraining``."""
    converted = {f"encoder.{name}": value for name, value in vit.convert_huggingface(state).items()}
    converted |= vit.convert_huggingface_blocks(state, "decoder.decoder_layers", "decoder.blocks")
    renamed = ("videomae.", "decoder.decoder_layers.")
    return converted | {name: value for name, value in state.items() if not name.startswith(renamed)}


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`convert_huggingface`, in the layout of transformers 5.

    Raises:
        ValueError: the weights are those of an OmniMAE.
    """
    _check_is_videomae(state)
    converted = vit.to_huggingface(vit.convert_original(state))
    converted |= vit.to_huggingface_blocks(state, "decoder.blocks", "decoder.decoder_layers")
    renamed = ("encoder.", "decoder.blocks.")
    return converted | {name: value for name, value in state.items() if not name.startswith(renamed)}


def _check_is_videomae(state: dict[str, Tensor]) -> None:
    if "encoder_to_decoder.bias" in state or "encoder.blocks.0.attn.qkv.bias" in state:
        raise ValueError(
            "these weights are those of an OmniMAE (encoder_to_decoder.bias, or a bias on the keys), which the layout "
            "of VideoMAE does not support: use to_omnimae."
        )


OMNIMAE = {  # prefixes outside the encoder: theirs -> ours
    "trunk.decoder.decoder_embed.": "encoder_to_decoder.",
    "trunk.decoder.decoder_blocks.": "decoder.blocks.",
    "trunk.decoder.norm.": "decoder.norm.",
    "head.": "decoder.head.",
}


def convert_omnimae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the weights of a pre-trained OmniMAE (``trunk.…``, ``head.…``).

    Raises:
        ValueError: see :func:`~blueberry_video.models.vit.check_positions`.
    """
    vit.check_positions(state, "trunk.decoder.pos_embed")
    converted = {f"encoder.{name}": value for name, value in vit.convert_omnimae(state).items()}
    for name, value in state.items():
        if name == "trunk.mask_token":
            converted["mask_token"] = value.view(1, 1, -1)  # (1, D) there
        elif name.startswith(("trunk.decoder.", "head.")) and name != "trunk.decoder.pos_embed":
            converted[_renamed(name.replace("head.projector.", "head."), OMNIMAE)] = value
    return converted


def to_omnimae(state: dict[str, Tensor], num_frames: int = 16, image_size: int = 224) -> dict[str, Tensor]:
    """Inverse of :func:`convert_omnimae`, with the two position tables, which the original model requires.

    Args:
        state: state dict of a :class:`~blueberry_video.models.masked_autoencoder.MaskedAutoencoder`.
        num_frames, image_size: size of the clips, which determines the length of the tables.

    Raises:
        ValueError: the weights are those of a VideoMAE.
    """
    if "encoder_to_decoder.bias" not in state:
        raise ValueError(
            "encoder_to_decoder.bias is missing: the layout of OmniMAE requires mask_before_projection=true. Use "
            "to_original or to_huggingface."
        )
    converted = vit.to_omnimae(vit.convert_original(state), num_frames, image_size)
    converted["trunk.decoder.pos_embed"] = converted["trunk.pos_embed"].clone()
    converted["trunk.mask_token"] = state["mask_token"].view(1, -1)
    theirs = {ours: their for their, ours in OMNIMAE.items()}
    rest = [name for name in state if name != "mask_token" and not name.startswith("encoder.")]
    return converted | {_renamed(name, theirs): state[name] for name in rest}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    """Replaces the prefix of a name; returns the name unchanged if it has none of ``prefixes``."""
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(found, "") + name.removeprefix(found)
