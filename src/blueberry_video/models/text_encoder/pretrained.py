"""Published text encoders, run by transformers: T5 for CogVideoX, LLaMA and CLIP for HunyuanVideo.

Captions that exceed the length of an encoder are truncated, as in the published pipelines.
"""

import hashlib
import json
from typing import Any, Literal

import torch

from blueberry_video.models.text_encoder.base import TextEncoder, TextTokens
from blueberry_video.weights.optional import import_extra, load_part

HUNYUAN_TEMPLATE = (  # prompt of HunyuanVideo's training
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
HUNYUAN_CROP = 95  # tokens of the template before the caption, of LLaMA 3's tokenizer


class T5Text(TextEncoder):
    """T5 v1.1 text encoder of CogVideoX: the last hidden states, padding included.

    The encoder and the network attend to padding, as in training; the mask only marks the text.

    Args:
        path: a local folder or hub id as diffusers writes it, such as ``THUDM/CogVideoX-2b``.
        length: tokens per caption: 226, in CogVideoX-1.5 224.
        unconditional: see :class:`.base.TextEncoder`; the original code of CogVideoX (SAT) trains and samples with
            zeros, the pipeline of diffusers samples with the encoding of "".
        dtype: of weights and tokens. float16 overflows.
        encoder_folder, tokenizer_folder: below ``path``; None for ``path`` itself.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: ``path`` has no encoder or tokenizer, or one of an unknown kind.
    """

    frozen = True

    def __init__(
        self,
        path: str,
        length: int = 226,
        unconditional: Literal["zeros", "empty"] = "zeros",
        dtype: Literal["float32", "bfloat16"] = "float32",
        encoder_folder: str | None = "text_encoder",
        tokenizer_folder: str | None = "tokenizer",
    ):
        transformers = import_extra("transformers")
        tokenizer = load_part(transformers.AutoTokenizer, path, tokenizer_folder, "tokenizer")
        encoder = _frozen(transformers.T5EncoderModel, path, encoder_folder, "T5 encoder", dtype)
        super().__init__(encoder.config.d_model, length, 0, unconditional)
        self.tokenizer, self.encoder = tokenizer, encoder
        self.vocabulary = _digest(tokenizer)

    def train(self, mode: bool = True) -> "T5Text":
        """Stays in evaluation mode, since the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, captions: list[str]) -> TextTokens:
        found = _tokenized(self.tokenizer, captions, self.length, self.encoder.device)
        return TextTokens(self.encoder(found["input_ids"])[0], found["attention_mask"].bool())


class HunyuanText(TextEncoder):
    """Text encoders of HunyuanVideo: hidden states of LLaMA with a prompt template, and CLIP's pooled vector.

    Args:
        path: a local folder or hub id as diffusers writes it, such as ``hunyuanvideo-community/HunyuanVideo``.
        length: tokens per caption, without the template.
        template: prompt with ``{}`` for the caption.
        crop_start: number of template tokens before the caption, which are removed from the output.
        hidden_state_skip_layer: number of final layers of LLaMA that are skipped.
        pooled_length: token length of CLIP.
        unconditional: see :class:`.base.TextEncoder`.
        dtype: of weights and tokens.

    Raises:
        ImportError, FileNotFoundError: see :class:`T5Text`.
        ValueError: ``template`` lacks ``{}``.
    """

    frozen = True

    def __init__(
        self,
        path: str,
        length: int = 256,
        template: str = HUNYUAN_TEMPLATE,
        crop_start: int = HUNYUAN_CROP,
        hidden_state_skip_layer: int = 2,
        pooled_length: int = 77,
        unconditional: Literal["zeros", "empty"] = "empty",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        if "{}" not in template:
            raise ValueError(f"template={template!r} must contain {{}} for the caption.")
        transformers = import_extra("transformers")
        tokenizers = [
            load_part(transformers.AutoTokenizer, path, name, "tokenizer") for name in ("tokenizer", "tokenizer_2")
        ]
        language = _frozen(transformers.AutoModel, path, "text_encoder", "language model", dtype)
        clip = _frozen(transformers.CLIPTextModel, path, "text_encoder_2", "CLIP text encoder", dtype)
        super().__init__(language.config.hidden_size, length, clip.config.hidden_size, unconditional)
        self.template, self.crop_start, self.pooled_length = template, crop_start, pooled_length
        self.hidden_state = -(hidden_state_skip_layer + 1)
        self.tokenizer, self.clip_tokenizer = tokenizers
        self.language, self.clip = language, clip
        self.vocabulary = "".join(map(_digest, tokenizers))

    def train(self, mode: bool = True) -> "HunyuanText":
        """Stays in evaluation mode, since the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, captions: list[str]) -> TextTokens:
        prompts = [self.template.format(caption) for caption in captions]
        found = _tokenized(self.tokenizer, prompts, self.length + self.crop_start, self.language.device)
        states = self.language(**found, output_hidden_states=True).hidden_states[self.hidden_state]
        clip = _tokenized(self.clip_tokenizer, captions, self.pooled_length, self.clip.device)
        return TextTokens(
            tokens=states[:, self.crop_start :],
            mask=found["attention_mask"][:, self.crop_start :].bool(),
            pooled=self.clip(clip["input_ids"]).pooler_output,
        )


def _frozen(loader: Any, path: str, subfolder: str | None, name: str, dtype: str) -> Any:
    model = load_part(loader, path, subfolder, name, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def _digest(tokenizer: Any) -> str:
    """Hash of the vocabulary and special tokens of a tokenizer, part of the encoder's fingerprint."""
    known = (tokenizer.get_vocab(), tokenizer.special_tokens_map)
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _tokenized(tokenizer: Any, texts: list[str], length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids and padding mask (B, length), padded or truncated."""
    found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return {key: found[key].to(device) for key in ("input_ids", "attention_mask")}
