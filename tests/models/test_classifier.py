"""VideoClassifier; parity with transformers is in test_videomae_parity."""

import re

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from blueberry_video.models import classifier
from blueberry_video.models.classifier import VideoClassifier, convert_finetuned
from blueberry_video.models.vit import VisionTransformer
from blueberry_video.nn.heads import ClassificationHead

VIDEO = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny(qkv_bias: str = "qv", **changes) -> VideoClassifier:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "drop_path": 0.5, "qkv_bias": qkv_bias}
    encoder = VisionTransformer(16, 4, 8, 2, **sizes, final_norm=False)
    return VideoClassifier(encoder, **{"num_classes": {"motion": 8, "shape": 3}, **changes})


def noisy(**changes) -> VideoClassifier:
    """Classifier in which no weight is 0 or 1, so that a dropped or misplaced weight changes the output."""
    model = tiny(head_init_scale=50.0, **changes).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_every_parameter_receives_a_gradient(pooling):
    model = tiny(pooling=pooling, num_heads=2, head_init_scale=1.0).eval()
    logits = model(VIDEO)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {"motion": (2, 8), "shape": (2, 3)}
    sum(torch.nn.functional.cross_entropy(value, torch.tensor([0, 2])) for value in logits.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_mean_pooling_normalizes_the_mean_of_the_tokens():
    model = tiny(head_init_scale=100.0).eval()
    pooled = torch.stack([model.encoder(VIDEO)[:, n] for n in range(8)]).sum(0) / 8
    centred = pooled - pooled.mean(1, keepdim=True)
    normalized = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    head = model.head.linear["shape"]
    torch.testing.assert_close(model(VIDEO)["shape"], normalized @ head.weight.T + head.bias, atol=1e-5, rtol=1e-5)


def test_frozen_encoder_stays_in_eval_mode_without_gradients():
    model = tiny(freeze_encoder=True).train()
    assert not model.encoder.training
    assert not model.encoder.blocks[0].training
    assert model.head.training
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    sum(value.square().sum() for value in model(VIDEO).values()).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    assert tiny().train().encoder.training


def test_head_init_scale_defaults_to_one_thousandth():
    weight = tiny().head.linear["motion"].weight
    assert weight.std().item() == pytest.approx(0.02 / 1000, rel=0.25)
    assert not tiny().head.linear["motion"].bias.any()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pooling": "max"}, "pooling='max'.*'mean'.*'attentive'"),
        ({"num_classes": {}}, "num_classes"),
        ({"pooling": "attentive", "num_heads": 3}, r"num_heads=3\b.*\b16\b"),
        ({"pooling": "attentive", "num_heads": 0}, r"num_heads=0\b.*\b16\b"),
    ],
)
def test_bad_arguments_raise(changes, text):
    with pytest.raises(ValueError, match=text):
        tiny(**changes)


def published() -> dict[str, torch.Tensor]:
    """State dict of a fine-tuned model under the original names."""
    state = dict(tiny().encoder.state_dict())
    ones = torch.ones(16)
    return state | {
        "fc_norm.weight": ones,
        "fc_norm.bias": ones,
        "head.weight": torch.ones(5, 16),
        "head.bias": ones[:5],
    }


def load(path) -> VideoClassifier:
    return VideoClassifier.from_published(path, num_frames=4, image_size=16, num_heads=2)


def test_published_head_gets_the_given_label(tmp_path):
    torch.save({"model": published()}, tmp_path / "ok.pth")
    assert load(tmp_path / "ok.pth")(VIDEO)["action"].shape == (2, 5)
    named = VideoClassifier.from_published(tmp_path / "ok.pth", "verb", num_frames=4, image_size=16, num_heads=2)
    assert set(named(VIDEO)) == {"verb"}


@pytest.mark.parametrize("absent", ["fc_norm.weight", "head.weight"])
def test_file_without_classifier_raises(absent, tmp_path):
    state = published()
    del state[absent]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"(?s)wrong\.pth.*fc_norm\.weight.*head\.weight.*masked_autoencoder"):
        load(tmp_path / "wrong.pth")


@pytest.mark.parametrize("absent", ["fc_norm.bias", "head.bias", "blocks.0.norm1.bias"])
def test_missing_weight_raises_with_its_name(absent, tmp_path):
    state = published()
    del state[absent]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=f"(?si)missing.*{absent.replace('head', 'head.linear.action')}"):
        load(tmp_path / "wrong.pth")


def test_learned_position_table_loads(tmp_path):
    state = {**published(), "pos_embed": torch.randn(1, 8, 16)}
    torch.save(state, tmp_path / "learned.pth")
    model = load(tmp_path / "learned.pth")
    assert torch.equal(model.encoder.pos_embed, state["pos_embed"])
    assert torch.equal(classifier.to_original(model.state_dict(), "action")["pos_embed"], state["pos_embed"])
    torch.save({**state, "pos_embed": torch.zeros(1, 9, 16)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"(?s)wrong\.pth.*pos_embed.*9.*8"):
        load(tmp_path / "wrong.pth")


LAYOUTS = [("qv", classifier.to_original), ("qv", classifier.to_huggingface)]
LAYOUTS += [("qkv", lambda state, label: classifier.to_omnimae(state, label, num_frames=4, image_size=16))]


@pytest.mark.parametrize(("qkv_bias", "to"), LAYOUTS, ids=["original", "huggingface", "omnimae"])
def test_published_layouts_round_trip(qkv_bias, to, tmp_path):
    model = noisy(qkv_bias=qkv_bias, num_classes={"action": 5})
    written = to(model.state_dict(), "action")
    again = convert_finetuned(written, "action", "source")
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.items())
    torch.save({"model": written}, tmp_path / "published.pth")
    torch.testing.assert_close(load(tmp_path / "published.pth").eval()(VIDEO), model(VIDEO), rtol=0, atol=0)


def test_transformers_computes_the_same_logits_from_converted_weights():
    model = noisy(num_classes={"action": 5, "other": 2})
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        layer_norm_eps=1e-6,
        num_labels=5,
        use_mean_pooling=True,
    )
    theirs = VideoMAEForVideoClassification(config).eval()
    theirs.load_state_dict(classifier.to_huggingface(model.state_dict(), "action"))
    theirs.fc_norm.eps = 1e-6
    with torch.no_grad():
        expected = theirs(VIDEO.transpose(1, 2)).logits
    torch.testing.assert_close(model(VIDEO)["action"], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", ["qv", "none"])
def test_saved_folder_loads_here_and_in_transformers(qkv_bias, tmp_path):
    model = noisy(qkv_bias=qkv_bias, num_classes={"action": 5, "other": 2})
    model.save_published(tmp_path / "saved", "action")
    again = VideoClassifier.from_published(tmp_path / "saved").eval()
    assert again.config() == model.config("action")
    assert torch.equal(again(VIDEO)["action"], model(VIDEO)["action"])
    assert VideoClassifier.from_published(tmp_path / "saved", num_frames=8).encoder.num_tokens == 16

    theirs, found = VideoMAEForVideoClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    theirs.eval().fc_norm.eps = 1e-6
    expected = theirs(VIDEO.transpose(1, 2)).logits
    torch.testing.assert_close(model(VIDEO)["action"], expected, atol=1e-5, rtol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    for method in (VideoClassifier.load_published, VideoClassifier.load_finetuned):
        loaded = tiny(qkv_bias=qkv_bias, num_classes={"verb": 5}).eval()
        assert str(tmp_path / "theirs") in method(loaded, tmp_path / "theirs")
        assert torch.equal(loaded(VIDEO)["verb"], model(VIDEO)["action"])
        with pytest.raises(ValueError, match=r"num_attention_heads=2 \(here 4\)"):
            method(VideoClassifier(VisionTransformer(16, 4, 8, 2, 16, 1, 4), {"verb": 5}), tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_classes": {"a": 2, "b": 3}}, r"num_classes=\{'a': 2, 'b': 3\}.*\ba, b\b"),
        ({"pooling": "attentive"}, "pooling='attentive'.*'mean'"),
        ({"head_norm": False}, "head_norm=False.*True"),
        ({"qkv_bias": "qkv"}, r"encoder\.qkv_bias='qkv'"),
    ],
)
def test_settings_without_a_counterpart_in_videomae_raise(changes, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        tiny(**{"num_classes": {"action": 5}, **changes}).save_published(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"encoder\.final_norm=True.*False"):
        VideoClassifier(encoder, {"action": 5}).save_published(tmp_path / "none")


@pytest.mark.parametrize(
    ("model", "label", "text"),
    [
        (tiny(), "colour", "'colour'.*motion.*shape"),
        (tiny(pooling="attentive"), "motion", r"(?s)head\.pool\.query.*final_norm=false.*pooling=mean"),
    ],
)
def test_head_without_a_published_layout_raises(model, label, text):
    for to in (classifier.to_original, classifier.to_huggingface, classifier.to_omnimae):
        with pytest.raises(ValueError, match=text):
            to(model.state_dict(), label)


def test_final_norm_of_the_encoder_without_a_published_layout_raises():
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"(?s)encoder\.norm\.weight.*final_norm=false"):
        classifier.to_original(VideoClassifier(encoder, {"motion": 8}).state_dict(), "motion")


def of_first_token() -> VideoClassifier:
    """VideoMAE of ``use_mean_pooling=False``, in which no weight is 0 or 1."""
    torch.manual_seed(1)
    encoder = VisionTransformer(16, 4, 8, 2, embed_dim=16, depth=1, num_heads=2)
    model = VideoClassifier(encoder, {"action": 5}, "first", head_norm=False, head_init_scale=50.0).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("to", [classifier.to_original, classifier.to_huggingface])
def test_without_mean_pooling_the_first_normalized_token_is_classified(to, tmp_path):
    """Rule of the original: LayerNorm over each token, then the linear layer on token 0, without ``fc_norm``."""
    model = of_first_token()
    written = to(model.state_dict(), "action")
    name = next(name for name in written if name.endswith(("head.weight", "classifier.weight")))
    norm = [
        written[next(key for key in written if re.search(rf"(^|\.)(layer)?norm\.{kind}$", key))]
        for kind in ("weight", "bias")
    ]
    assert not any("fc_norm" in key for key in written)
    tokens = []
    model.encoder.blocks[-1].register_forward_hook(lambda _, inputs, output: tokens.append(output))
    logits = model(VIDEO)["action"]
    first = tokens[0][:, 0]
    centred = first - first.mean(1, keepdim=True)
    normalized = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm[0] + norm[1]
    expected = normalized @ written[name].T + written[name.replace("weight", "bias")]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    torch.save({"module": written}, tmp_path / "first.pth")
    loaded = load(tmp_path / "first.pth").eval()
    assert (loaded.pooling, loaded.state_dict().keys()) == ("first", model.state_dict().keys())
    assert torch.equal(loaded(VIDEO)["action"], logits)
    for method in (VideoClassifier.load_published, VideoClassifier.load_finetuned):
        other = VideoClassifier(VisionTransformer(16, 4, 8, 2, 16, 1, 2), {"verb": 5}, "first", head_norm=False).eval()
        method(other, tmp_path / "first.pth")
        assert torch.equal(other(VIDEO)["verb"], logits)


def test_without_mean_pooling_a_saved_folder_loads_in_transformers(tmp_path):
    model = of_first_token()
    model.save_published(tmp_path / "ours")
    theirs, found = VideoMAEForVideoClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not theirs.config.use_mean_pooling
    expected = theirs.eval()(VIDEO.transpose(1, 2)).logits
    torch.testing.assert_close(model(VIDEO)["action"], expected, atol=1e-5, rtol=1e-5)


def test_weights_of_the_other_pooling_are_not_loaded_into_a_head(tmp_path):
    """A head without LayerNorm has the same tensors for the mean and for the first token."""
    torch.save({"model": classifier.to_original(of_first_token().state_dict(), "action")}, tmp_path / "first.pth")
    mean = VideoClassifier(VisionTransformer(16, 4, 8, 2, 16, 1, 2), {"action": 5}, "mean", head_norm=False)
    before = mean.head.linear["action"].weight.clone()
    assert "'action' was ignored, because its pooling" in mean.load_published(tmp_path / "first.pth")
    assert torch.equal(mean.head.linear["action"].weight, before)
    with pytest.raises(ValueError, match=r"model\.pooling='first'.*'mean'"):
        mean.load_finetuned(tmp_path / "first.pth")
    with pytest.raises(ValueError, match=r"first\.pth.*head\.fc_norm\.bias"):  # a head of the mean
        tiny(num_classes={"action": 5}).load_finetuned(tmp_path / "first.pth")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"final_norm": False}, r"final_norm=False.*True"), ({"head_norm": True}, r"head_norm=True.*False")],
)
def test_first_pooling_without_a_counterpart_in_videomae_raises(changes, expected, tmp_path):
    encoder = VisionTransformer(16, 4, 8, 2, 16, 1, 2, final_norm=changes.get("final_norm", True))
    model = VideoClassifier(encoder, {"action": 5}, "first", head_norm=changes.get("head_norm", False))
    with pytest.raises(ValueError, match=expected):
        model.save_published(tmp_path / "none")
    with pytest.raises(ValueError, match=r"encoder\.norm\.weight|without LayerNorm"):
        classifier.to_original(model.state_dict(), "action")
    with pytest.raises(ValueError, match=r"OmniMAE.*final_norm=false"):
        classifier.to_omnimae(of_first_token().state_dict(), "action")


def test_omnimae_layout_stores_the_head_norm_as_trunk_norm(tmp_path):
    """The file has the layout of the original repository, with the position table as a buffer."""
    state = noisy(qkv_bias="qkv", num_classes={"action": 5}).state_dict()
    written = classifier.to_omnimae(state, "action", num_frames=4, image_size=16)
    assert torch.equal(written["trunk.norm.weight"], state["head.fc_norm.weight"])
    assert torch.equal(written["head.bias"], state["head.linear.action.bias"])
    assert written["trunk.pos_embed"].shape == (1, 8, 16)
    torch.save(written, tmp_path / "omnimae.torch")
    assert load(tmp_path / "omnimae.torch")(VIDEO[:, :, :1])["action"].shape == (2, 5)  # accepts single frames


# ---- init_from: partial loading into a classifier ----


@pytest.fixture
def file(tmp_path):
    """Function that saves a state dict and returns its path."""

    def write(state) -> str:
        torch.save(state, tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return write


def same(model: VideoClassifier, source: VideoClassifier, prefix: str) -> bool:
    own, theirs = model.state_dict(), source.state_dict()
    return all(torch.equal(own[name], theirs[name]) for name in own if name.startswith(prefix))


def test_published_head_loads_into_the_only_label(file):
    source, model = noisy(num_classes={"action": 5}), tiny(num_classes={"verb": 5})
    path = file({"module": classifier.to_original(source.state_dict(), "action")})
    report = model.load_published(path)
    assert re.search(rf"\b15\b.*{re.escape(path)}.*'verb'.*\b5\b", report)
    assert same(model, source, "encoder.")
    assert torch.equal(model.eval()(VIDEO)["verb"], source(VIDEO)["action"])


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ({"action": 4}, r"'action'.*\b5\b.*'action'.*\b4\b"),
        ({"action": 5, "verb": 5}, r"\b5\b.*'action'.*\b5\b.*'verb'.*\b5\b"),
    ],
)
def test_head_that_does_not_fit_is_ignored_and_reported(file, classes, expected):
    source, model = noisy(num_classes={"action": 5}), tiny(num_classes=classes)
    before = model.head.linear["action"].weight.clone()
    assert re.search(expected, model.load_published(file(classifier.to_original(source.state_dict(), "action"))))
    assert same(model, source, "encoder.")
    assert same(model, source, "head.fc_norm.")
    assert torch.equal(model.head.linear["action"].weight, before)


def test_own_heads_are_matched_by_label(file):
    source, model = noisy(num_classes={"motion": 8, "shape": 3}), tiny(num_classes={"shape": 3, "motion": 6, "size": 2})
    state = {f"model.{name}": value for name, value in source.state_dict().items()}
    report = model.load_published(file({"state_dict": state}))
    assert re.search(r"'shape'.*\b3\b.*'motion'.*\b8\b", report)
    assert same(model, source, "head.linear.shape.")
    assert not model.head.linear["size"].bias.any()


def test_head_with_different_pooling_is_ignored(file):
    source, model = noisy(), tiny(pooling="attentive")
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    assert re.search("'motion'.*'shape'.*pool", model.load_published(file(source.state_dict())))
    assert all(torch.equal(value, before[name]) for name, value in model.head.state_dict().items())
    assert same(model, source, "encoder.")


@pytest.mark.parametrize("head_norm", [True, False])
def test_head_of_different_width_is_ignored(file, head_norm):
    """This occurs between mean and context pooling of a Spool."""
    source, model = noisy(head_norm=head_norm), tiny(head_norm=head_norm)
    source.head = ClassificationHead(32, source.num_classes, final_norm=head_norm)
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    assert re.search("'motion'.*'shape'.*width", model.load_published(file(source.state_dict())))
    torch.testing.assert_close(model.head.state_dict(), before, rtol=0, atol=0)
    assert same(model, source, "encoder.")


def test_pretrained_file_loads_only_the_encoder(file):
    source, model = noisy(), tiny()
    state = {f"encoder.{name}": value for name, value in source.encoder.state_dict().items()}
    report = model.load_published(file({"model": state | {"decoder.head.weight": torch.zeros(3, 3)}}))
    assert "no head" in report
    assert same(model, source, "encoder.")


def test_pixel_head_of_a_pretrained_omnimae_is_ignored(file):
    source, model = noisy(qkv_bias="qkv", num_classes={"action": 5}), tiny(qkv_bias="qkv", num_classes={"action": 5})
    state = classifier.to_omnimae(source.state_dict(), "action", num_frames=4, image_size=16)
    assert "no head" in model.load_published(file(state | {"trunk.mask_token": torch.zeros(1, 16)}))


def test_encoder_that_does_not_fit_raises(file):
    state = noisy().state_dict()
    del state["encoder.blocks.0.norm1.bias"]
    with pytest.raises(ValueError, match=r"(?s)weights\.pth.*\b1 missing.*blocks\.0\.norm1\.bias"):
        tiny().load_published(file(state))


def test_load_whole_is_strict(file):
    source = noisy(num_classes={"action": 5})
    model = tiny(num_classes={"verb": 5})
    written = classifier.to_original(source.state_dict(), "action")
    assert re.search(r"\b19\b", model.load_finetuned(file(written)))
    assert torch.equal(model.eval()(VIDEO)["verb"], source(VIDEO)["action"])
    faults = [({"num_classes": {"verb": 4}}, r"\b2\b.*head\.linear\.verb\.bias")]
    faults += [
        ({"num_classes": {"a": 5, "b": 2}}, r"\b4\b.*\b2\b.*head\.linear\."),
        ({"pooling": "attentive"}, r"head\."),
    ]
    for changes, text in faults:
        with pytest.raises(ValueError, match=rf"(?s)weights\.pth.*{text}.*num_classes"):
            tiny(**changes).load_finetuned(file(written))
    pre_trained = {name: value for name, value in written.items() if not name.startswith(("head.", "fc_norm."))}
    with pytest.raises(ValueError, match=r"(?s)weights\.pth.*\b4\b.*head\.fc_norm\.bias"):
        model.load_finetuned(file(pre_trained))


def test_the_head_receives_the_tokens_of_all_segments():
    """Each segment is encoded alone; the pooling attends to the tokens of all, in the order of the segments."""
    model = noisy(pooling="attentive", num_heads=2, segments=3)
    parts = [torch.randn(2, 3, 4, 16, 16) for _ in range(3)]
    tokens = torch.cat([model.encoder(part) for part in parts], dim=1)
    torch.testing.assert_close(model(torch.cat(parts, dim=2)), model.head(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"4 frames.*model\.segments=3\b"):
        model(VIDEO)
    with pytest.raises(ValueError, match=r"model\.segments=0\b"):
        tiny(segments=0)


def test_segment_positions_are_those_of_the_frames_in_the_file():
    """V-JEPA: sin and cos of the index of the first frame of each tubelet, at frequencies 10000^(-i / (D / 2)), added
    to all tokens of the tubelet."""
    model = noisy(pooling="attentive", num_heads=2, segments=2, segment_positions=True)
    video, frames = torch.randn(1, 3, 8, 16, 16), torch.tensor([[3, 5, 7, 9, 40, 42, 44, 46]])
    tokens = torch.cat([model.encoder(part) for part in video.chunk(2, dim=2)], dim=1)  # 4 tubelets of 4 tokens
    frequency = 10000 ** (-torch.arange(8) / 8)
    rows = [torch.cat([(t * frequency).sin(), (t * frequency).cos()]) for t in (3, 7, 40, 44)]
    tokens = tokens + torch.stack([row for row in rows for _ in range(4)])
    torch.testing.assert_close(model(video, frames), model.head(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"segment_positions=true.*frames.*sampler=segments"):
        model(video)
