"""Writing of modules as ``torch.export`` programs and ONNX files, with a text in their metadata."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from blueberry_video.atomic import atomic_file
from blueberry_video.installation import install_command


def write_torch(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    names: Sequence[str],
    outputs: Sequence[str],
    path: Path,
    metadata: str,
    entry: str,
) -> None:
    """Writes a program that ``torch.export.load`` reads, for inputs of one size.

    Args:
        module: in evaluation mode.
        inputs: example inputs.
        names, outputs: names of inputs and outputs, which a program of PyTorch does not hold.
        path: the file, replaced if it exists.
        metadata: text of the extra file ``entry``.
    """
    program = torch.export.export(module, inputs)
    with atomic_file(path) as file:
        torch.export.save(program, file, extra_files={entry: metadata})


def write_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    names: Sequence[str],
    outputs: Sequence[str],
    path: Path,
    metadata: str,
    entry: str,
) -> None:
    """Writes an ONNX file; the arguments are those of :func:`write_torch`, and ``entry`` a key of the file's metadata.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"format=onnx requires the package {error.name}: run `{install_command('onnx')}`, or use format=torch."
        ) from error
    program = torch.onnx.export(
        module, inputs, dynamo=True, verbose=False, input_names=list(names), output_names=list(outputs), optimize=True
    )
    assert program is not None
    program.model.metadata_props[entry] = metadata
    program.save(path)
