"""Precompute entry point: encodes the clips and captions of an experiment once, for training to read.

    python -m blueberry_video.precompute --config-dir experiments/<name> [--out <folder>] [key=value …]

Writes <out>/{train,val,test}/ with the autoencoder and the frozen text encoder, if any, of the model. After a kill,
the same command continues, and the files are identical byte for byte.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig

from blueberry_video.config.checks import targets
from blueberry_video.installation import start_command
from blueberry_video.launch import command_line, signals
from blueberry_video.launch.errors import OneParagraphErrors

if TYPE_CHECKING:  # torch is imported after the config is checked
    from blueberry_video.data.clip_cache import KeyedClips
    from blueberry_video.diffusion.text_to_video import Transformer
    from blueberry_video.models.autoencoder.base import Autoencoder
    from blueberry_video.models.text_encoder.base import TextEncoder


def main() -> None:
    parser = argparse.ArgumentParser(prog="blueberry latents", allow_abbrev=False, add_help=False)
    parser.add_argument("--out", default="", help="folder to write to; defaults to data/latents/<name>")
    parser.add_argument("--dtype", choices=command_line.DTYPES, default="float32", help="of the stored tensors")
    parser.add_argument("--shard-size", type=int, default=64, help="clips per file")
    known, rest = parser.parse_known_args(sys.argv[1:])
    config = (command := command_line.parse(rest)).config()
    command_line.quiet_libraries()
    read = run(config, Path(known.out or f"data/latents/{config.name}"), known.dtype, known.shard_size)
    kept = [word for word in command.overrides if not word.lstrip("+~").startswith(("data=", "data."))]
    words = [word if re.fullmatch(r"[^\s'\"\\]+", word) else shlex.quote(word) for word in (*read, *kept)]
    print(f"train on them with: {start_command('train', config.name, ARGS=' '.join(words))}")


def run(config: DictConfig, out: Path, dtype: str = "float32", shard_size: int = 64) -> list[str]:
    """Writes the latents of every split of the experiment's data.

    Returns:
        The overrides for training the experiment on the latents.

    Raises:
        ValueError: if the model has no autoencoder, or the data are stored latents; see also :func:`write_latents`.
    """
    import torch
    from hydra.utils import instantiate
    from lightning import seed_everything

    from blueberry_video.data.buckets import reading

    if not config.model.get("autoencoder"):
        raise ValueError(
            f"model={config.model.get('_target_')} has no autoencoder (model.autoencoder) to encode latents with: "
            "use an experiment with one, such as those with model=text_to_video/…."
        )
    if any(node["_target_"].endswith(".LatentClips") for _, node in targets(config.data, "data")):
        raise ValueError(
            f"the data of name={config.name} are stored latents (LatentClips): choose the clips to encode, as in "
            'ARGS="data=captioned_videos data.train.root=data/my_videos".'
        )
    seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.data)  # first: its errors are raised before large weights are read
    data.list_skipped_in(str(out / "skipped.csv"))
    with torch.device("meta"):
        network = instantiate(config.model.transformer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    now = {"_partial_": False}  # a config may build them later, in the model
    autoencoder = instantiate(config.model.autoencoder, **now).to(device).eval()
    text = instantiate(config.model.text, **now).to(device).eval() if config.model.get("text") else None
    for split in ("train", "val", "test"):
        if (dataset := getattr(data, split)) is not None:
            write_latents(dataset, autoencoder, text, out / split, dtype, shard_size, data.num_workers, network)
    sizes = {key: config.data[key] for key in ("batch_size", "val_batch_size") if config.data.get(key) is not None}
    return reading(out, {"train": data.train, "val": data.val}, network.patch_size, sizes)


def write_latents(
    dataset: "KeyedClips",
    autoencoder: "Autoencoder",
    text: "TextEncoder | None",
    folder: Path,
    dtype: str = "float32",
    shard_size: int = 64,
    num_workers: int = 0,
    network: "Transformer | None" = None,
) -> None:
    """Encodes a dataset, clip by clip, and writes the shards missing in ``folder``.

    Args:
        dataset: clips with captions; must have a ``cache_key``.
        autoencoder, text: on their device, in evaluation mode. For a trainable text encoder, or None, only captions are
            stored.
        folder: folder of this dataset; :class:`~blueberry_video.data.latents.LatentClips` reads it.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        shard_size: clips per file.
        num_workers: number of processes that read clips.
        network: the transformer to train: its patch size must divide the latents, and with an image condition the
            latents of the first frame are stored too.

    Raises:
        ValueError: if a clip has no caption, an unsupported size, or NaN latents; before encoding, if a bucket has an
            unsupported size, the folder was written with other settings, or the dataset cannot be stored.
    """
    import torch
    from torch.utils.data import DataLoader, Dataset, Subset

    from blueberry_video.data.clip_cache import check_storable
    from blueberry_video.data.latents import LatentShards
    from blueberry_video.data.progress import Progress
    from blueberry_video.diffusion.encoding import check_size, encode, encodes_image
    from blueberry_video.models.autoencoder.base import fingerprint

    check_storable(dataset)
    patch_size = (1, 1) if network is None else network.patch_size[1:]
    image = network is not None and encodes_image(network, autoencoder)
    for name, size in getattr(dataset, "sizes", {}).items():
        check_size(f"the bucket {name}", size, autoencoder, patch_size)
    text = text if text is not None and text.frozen else None
    made_of = {
        "autoencoder": f"{type(autoencoder).__name__}/{fingerprint(autoencoder)}",
        "text": None if text is None else f"{type(text).__name__}/{fingerprint(text)}",
        "data": dataset.cache_key,
        "dtype": dtype,
        "image": image,
    }
    known = (getattr(dataset, "classes", {}), getattr(dataset, "reversal_pairs", {}))
    with LatentShards(folder, made_of, len(dataset), shard_size, *known) as shards:
        wanted = [index for number in shards.missing for index in shards.indices(number)]
        rows: Subset = Subset(cast(Dataset, dataset), wanted)
        clips = iter(DataLoader(rows, batch_size=None, num_workers=num_workers))
        progress = Progress(str(folder), len(wanted))
        for number in shards.missing:
            encoded = []
            for _ in shards.indices(number):
                encoded.append(encode(next(clips), autoencoder, text, getattr(torch, dtype), patch_size, image))
                progress.add(1)
            shards.write(number, encoded)


if __name__ == "__main__":
    with OneParagraphErrors(), signals.handled("The latents are not complete: repeat the command."):
        main()
