"""Scans compared with token-by-token recurrences in float64 and with the dense reference."""

import doctest
import itertools

import pytest
import torch
from torch import Tensor

from blueberry_video.ops import chunked, scan, ssd, ssd_step, video_ssd

BACKENDS = ("reference", "torch")
CASES = {  # frames, tokens of a frame (or lengths a sample), heads, groups
    "one group": (3, 5, 4, 1),
    "two groups": (3, 5, 4, 2),
    "a group a head": (2, 6, 3, 3),
    "one frame": (1, 7, 2, 1),
    "one token a frame": (6, 1, 2, 2),
    "one token": (1, 1, 2, 1),
    "ragged": ([[3, 0, 5, 1], [2, 4, 0, 3]], None, 4, 2),
}


class Inputs:
    """Random arguments of ssd and video_ssd."""

    def __init__(self, frames: int | list[list[int]], tokens: int | None, heads: int, groups: int, dtype=torch.float64):
        torch.manual_seed(1)
        self.segment = tokens if tokens is not None else torch.tensor(frames)
        self.lengths = torch.tensor([[tokens] * frames] * 2) if tokens is not None else self.segment
        self.batch, self.frames = self.lengths.shape
        self.heads, self.groups, length = heads, groups, int(self.lengths[0].sum())
        shapes = {"x": (2, length, heads, 3)} | dict.fromkeys(("B_f", "C_f", "B_b", "C_b"), (2, length, groups, 4))
        shapes |= {"D": (heads,), "h0": (2, heads, 3, 4), "g0": (2, self.frames, heads, 3, 4)}
        self.named = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
        for leg in "fb":
            self.named[f"dt_{leg}"] = torch.rand(2, length, heads, dtype=dtype) * 0.6 + 0.01
            self.named[f"A_{leg}"] = -torch.rand(heads, dtype=dtype) * 2 - 0.1
        for tensor in self.named.values():
            tensor.requires_grad_()

    def __getitem__(self, names: str) -> list[Tensor]:
        return [self.named[name] for name in names.split()]

    def video_ssd(self, backend: str | None = None, chunk: int | None = None, **changed):
        arguments = dict(zip(NAMES, self[" ".join(NAMES)], strict=True)) | {"segment_len": self.segment}
        arguments |= dict(zip(("h0", "g0"), self["h0 g0"], strict=True)) | changed
        return video_ssd(**{"chunk": chunk, "backend": backend} | arguments, return_frame_states=True)

    def ssd(self, backend: str | None = None, chunk: int | None = None):
        x, dt, A, B, C, D, h0 = self["x dt_f A_f B_f C_f D h0"]
        return ssd(x, dt, A, B, C, D, self.segment, h0, chunk, return_frame_states=True, backend=backend)


NAMES = ("x", "dt_f", "dt_b", "A_f", "A_b", "B_f", "C_f", "B_b", "C_b", "D")


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def inputs(request) -> Inputs:
    return Inputs(*request.param)


def recurrence(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """video_ssd one token at a time: each token reads the state before it is written into it."""
    x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D = inputs[" ".join(NAMES)]
    y, states = torch.zeros_like(x), torch.zeros(2, inputs.frames, *inputs["h0"][0].shape[1:], dtype=x.dtype)
    for b, h in itertools.product(range(2), range(inputs.heads)):
        g = h * inputs.groups // inputs.heads
        state, end = inputs["h0"][0][b, h], 0
        for t, length in enumerate(inputs.lengths[b].tolist()):
            start, end = end, end + length
            for i in range(start, end):
                faded = (dt_f[b, i, h] * A_f[h]).exp() * state
                y[b, i, h] = faded @ C_f[b, i, g] + D[h] * x[b, i, h]
                state = faded + dt_f[b, i, h] * torch.outer(x[b, i, h], B_f[b, i, g])
            states[b, t, h] = state
            back = inputs["g0"][0][b, t, h]
            for i in reversed(range(start, end)):
                faded = (dt_b[b, i, h] * A_b[h]).exp() * back
                y[b, i, h] += faded @ C_b[b, i, g]
                back = faded + dt_b[b, i, h] * torch.outer(x[b, i, h], B_b[b, i, g])
    return y, states


def gradients(output: tuple[Tensor, Tensor], names: str, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(2)
    loss = sum((part * torch.randn(part.shape, dtype=torch.float64).to(part.dtype)).sum() for part in output)
    return list(torch.autograd.grad(loss, inputs[names], retain_graph=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_video_ssd_equals_recurrence(inputs: Inputs, backend: str):
    with torch.no_grad():
        expected = recurrence(inputs)
        for found, right in zip(inputs.video_ssd(backend), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, None])
def test_any_chunk_size_equals_reference_with_gradients(inputs: Inputs, chunk: int | None):
    names = " ".join(NAMES) + " h0 g0"
    expected, found = inputs.video_ssd("reference"), inputs.video_ssd("torch", chunk)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    for name, ours, right in zip(
        names.split(), gradients(found, names, inputs), gradients(expected, names, inputs), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_ssd_equals_recurrence_with_gradients(inputs: Inputs, chunk: int | None):
    names = "x dt_f A_f B_f C_f D h0"
    x, dt, A, B, C, D, state = inputs[names]
    steps = []
    for i in range(x.shape[1]):
        y, state = ssd_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], D, state)
        steps.append((y, state))
    found, dense = inputs.ssd("torch", chunk), inputs.ssd("reference")
    for output, right in ((found, dense), (dense, found)):
        torch.testing.assert_close(output[0], torch.stack([y for y, _ in steps], 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(output[1], right[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1][:, -1], state, rtol=0, atol=1e-12)
    for ours, right in zip(gradients(found, names, inputs), gradients(dense, names, inputs), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-10)


def test_parts_of_any_size_equal_one_part(inputs: Inputs, monkeypatch: pytest.MonkeyPatch):
    names = " ".join(NAMES) + " h0 g0"
    whole = inputs.video_ssd("torch")
    expected = gradients(whole, names, inputs)  # before PAIRS changes: the backward pass reads it as well
    for pairs in (1, 30, 200):
        monkeypatch.setattr(chunked, "PAIRS", (pairs, pairs))
        parts = inputs.video_ssd("torch")
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)
        for ours, right in zip(gradients(parts, names, inputs), expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


def test_gradcheck_with_frame_states():
    inputs = Inputs(2, 3, 2, 1)
    arguments = inputs[" ".join(NAMES)]

    def function(*tensors: Tensor):
        *tensors, h0, g0 = tensors
        return video_ssd(*tensors, 3, h0, g0, chunk=2, return_frame_states=True, backend="torch")

    assert torch.autograd.gradcheck(function, (*arguments, *inputs["h0 g0"]))


def test_hydra_shift_equals_two_shifted_recurrences():
    inputs = Inputs(1, 6, 4, 2)
    x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b = inputs[" ".join(NAMES[:-1])]
    delta = torch.randn(2, 6, 4, dtype=torch.float64)
    y = video_ssd(x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, delta, 6, shift="hydra")
    expected = delta[..., None] * x
    for b, h in itertools.product(range(2), range(4)):
        ahead = back = torch.zeros(3, 4, dtype=torch.float64)
        g = h // 2
        for i in range(5):
            ahead = (dt_f[b, i, h] * A_f[h]).exp() * ahead + dt_f[b, i, h] * torch.outer(x[b, i, h], B_f[b, i, g])
            expected[b, i + 1, h] += ahead @ C_f[b, i, g]
            j = 5 - i
            back = (dt_b[b, j, h] * A_b[h]).exp() * back + dt_b[b, j, h] * torch.outer(x[b, j, h], B_b[b, j, g])
            expected[b, j - 1, h] += back @ C_b[b, j, g]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", ["strict", "hydra"])
def test_two_causal_scans_equal_video_ssd(shift: str):
    inputs = Inputs(3, 5, 4, 2)
    forward, backward = inputs["dt_f A_f B_f C_f"], inputs["dt_b A_b B_b C_b"]
    x, D = inputs["x D"]
    y, states = scan.two_scans(x, tuple(forward), tuple(backward), D, 5, shift=shift)
    expected = inputs.video_ssd(h0=None, g0=None, shift=shift)
    torch.testing.assert_close((y, states), expected, rtol=0, atol=1e-12)


# ---- causality and streaming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_future_leakage(backend: str):
    inputs = Inputs(3, 4, 2, 1)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: inputs.video_ssd(backend, x=x)[0], inputs["x"][0].detach(), vectorize=False
    )
    reach = jacobian[0, :, :, :, 0].abs().sum((1, 2, 4, 5)).unflatten(0, (3, 4)).unflatten(2, (3, 4))  # (t, s, t', s')
    for t, s, other in itertools.product(range(3), range(4), range(4)):
        assert reach[t, s, t, other] > 0, "a token attends to its whole frame"
        assert all((reach[t, s, later] == 0).all() for later in range(t + 1, 3)), "and to no later frame"
        assert all((reach[t, s, earlier] > 0).all() for earlier in range(t))


@pytest.mark.parametrize("split", range(1, 4))
def test_streaming_equals_full_scan(split: int):
    inputs = Inputs(4, 5, 4, 2)
    whole, states = inputs.video_ssd()
    state, outputs = inputs["h0"][0], []
    for part in (slice(0, split), slice(split, 4)):
        tokens = slice(part.start * 5, part.stop * 5)
        changed = {
            name: tensor[:, tokens] for name, tensor in inputs.named.items() if name[:2] in ("x", "dt", "B_", "C_")
        }
        y, frame_states = inputs.video_ssd(**changed, h0=state, g0=inputs["g0"][0][:, part])
        state = frame_states[:, -1]
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, states[:, -1], rtol=0, atol=1e-12)


def test_part_of_a_frame_from_surrounding_states():
    """Forward state before and backward state after a run of tokens in one frame, as cached by generation."""
    inputs = Inputs(1, 9, 4, 2)
    whole, _ = inputs.video_ssd()
    x, dt_f, A_f, B_f, C_f = inputs["x dt_f A_f B_f C_f"]
    _, before = ssd(x, dt_f, A_f, B_f, C_f, None, 3, inputs["h0"][0], return_frame_states=True)
    x, dt_b, B_b, C_b = (tensor.flip(1) for tensor in inputs["x dt_b B_b C_b"])
    start = inputs["g0"][0][:, 0]
    _, after = ssd(x, dt_b, inputs["A_b"][0], B_b, C_b, None, 3, start, return_frame_states=True)
    middle = slice(3, 6)
    changed = {name: tensor[:, middle] for name, tensor in inputs.named.items() if name[:2] in ("x", "dt", "B_", "C_")}
    y, _ = inputs.video_ssd(**changed, segment_len=3, h0=before[:, 0], g0=after[:, 0])
    torch.testing.assert_close(y, whole[:, middle], rtol=0, atol=1e-12)


def test_diagonal_per_token(inputs: Inputs):
    x = inputs["x"][0]
    delta = torch.randn(x.shape[:3], dtype=torch.float64)
    y, _ = inputs.video_ssd("torch", D=delta)
    without, _ = inputs.video_ssd("torch", D=None)
    torch.testing.assert_close(y, without + delta[..., None] * x, rtol=0, atol=1e-12)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_opcheck():
    inputs = Inputs(2, 3, 2, 1)
    x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D = (tensor.detach() for tensor in inputs[" ".join(NAMES)])
    h0, g0 = (tensor.detach() for tensor in inputs["h0 g0"])
    directions = dt_f, dt_f * A_f, B_f, C_f, dt_b, dt_b * A_b, B_b, C_b
    arguments = [x, *directions, D.expand(2, 6, 2).clone(), None, 3, h0, g0, 0, "torch"]
    arguments = [value.requires_grad_() if isinstance(value, Tensor) else value for value in arguments]
    torch.library.opcheck(torch.ops.blueberry_video.scan.default, tuple(arguments))
    causal = [*arguments[:5], *[None] * 5, inputs.lengths, 3, None, None, 0, "torch"]
    torch.library.opcheck(torch.ops.blueberry_video.scan.default, tuple(causal))


def test_compiles_fullgraph():
    inputs = Inputs(3, 4, 4, 2)
    arguments = inputs[" ".join(NAMES)]
    function = torch.compile(lambda *tensors: video_ssd(*tensors, 4), fullgraph=True, backend="aot_eager")
    ragged = torch.compile(
        lambda *tensors: video_ssd(*tensors, inputs.lengths, max_segment=4), fullgraph=True, backend="aot_eager"
    )
    expected = video_ssd(*arguments, 4)
    right = torch.autograd.grad(expected.square().sum(), arguments)
    for compiled in (function, ragged):
        y = compiled(*arguments)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), arguments), right, rtol=0, atol=1e-10)


def test_expanded_gradients_and_non_contiguous_inputs():
    inputs = Inputs(3, 5, 4, 2)
    names = " ".join(NAMES) + " h0 g0"
    expected = torch.autograd.grad(inputs.video_ssd("reference")[0].sum(), inputs[names])
    swapped = {name: inputs[name][0].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "B_f", "C_b")}
    found = torch.autograd.grad(inputs.video_ssd("torch", **swapped)[0].sum(), inputs[names])
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_precision_of_narrow_dtypes(dtype: torch.dtype, rtol: float):
    names = " ".join(NAMES) + " h0 g0"
    exact = Inputs(3, 70, 4, 2)
    narrow = Inputs(3, 70, 4, 2)
    for name in ("x", "B_f", "C_f", "B_b", "C_b"):  # equal values in both
        narrow.named[name] = exact.named[name].detach().to(dtype).requires_grad_()
        exact.named[name] = narrow.named[name].detach().double().requires_grad_()
    for name in set(names.split()) - {"x", "B_f", "C_f", "B_b", "C_b"}:
        narrow.named[name] = exact.named[name].detach().float().requires_grad_()
        exact.named[name] = narrow.named[name].detach().double().requires_grad_()
    found, expected = narrow.video_ssd("torch"), exact.video_ssd("torch")
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    pairs = zip(
        [*found, *gradients(found, names, narrow)], [*expected, *gradients(expected, names, exact)], strict=True
    )
    for ours, right in pairs:
        assert (ours.double() - right).norm() <= rtol * right.norm()


@pytest.mark.parametrize("chunk", [None, 256])
@pytest.mark.parametrize("large", [10.0, 40.0, 200.0])
def test_small_dt_after_large_dt_keeps_precision(large: float, chunk: int | None):
    """Cumulative log-decays reach the thousands; the result depends on differences between small steps."""
    names = " ".join(NAMES)
    exact, narrow = Inputs(1, 256, 2, 1), Inputs(1, 256, 2, 1, dtype=torch.float32)
    position = torch.arange(256)[:, None] % 64
    for leg in "fb":
        steps = torch.where(position < 48, large, 0.01) * torch.rand(2, 256, 2)
        values = {f"dt_{leg}": steps, f"A_{leg}": -torch.ones(2)}
        for name, value in values.items():
            exact.named[name], narrow.named[name] = value.double().requires_grad_(), value.clone().requires_grad_()
    for name in ("x", "B_f", "C_f", "B_b", "C_b", "D", "h0", "g0"):
        narrow.named[name] = exact.named[name].detach().float().requires_grad_()
        exact.named[name] = narrow.named[name].detach().double().requires_grad_()
    found, expected = narrow.video_ssd("torch", chunk), exact.video_ssd("torch", chunk)
    pairs = zip(
        [*found, *gradients(found, names, narrow)], [*expected, *gradients(expected, names, exact)], strict=True
    )
    for ours, right in pairs:
        assert (ours.double() - right).abs().max() <= 1e-5 * right.abs().max()


def test_autocast_is_disabled_in_the_scan():
    inputs = Inputs(3, 5, 4, 2, dtype=torch.float32)
    expected = inputs.video_ssd("torch")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(inputs.video_ssd("torch"), expected, rtol=0, atol=0)


# ---- extreme and invalid values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e3, 1e6])
def test_extreme_dt(scale: float):
    names = "x dt_f dt_b B_f C_f B_b C_b h0 g0"
    inputs = Inputs(3, 5, 4, 2)
    for leg in "fb":
        inputs.named[f"dt_{leg}"] = (inputs.named[f"dt_{leg}"].detach() * scale).requires_grad_()
        inputs.named[f"dt_{leg}"].data[:, ::3] = 0.2  # mixed with ordinary steps
    expected, found = inputs.video_ssd("reference"), inputs.video_ssd("torch", 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, right in zip(gradients(found, names, inputs), gradients(expected, names, inputs), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def test_overflow_in_half_precision_is_infinite():
    inputs = Inputs(2, 3, 2, 1)
    x, dt_f, dt_b, A_f, A_b, B_f, C_f, B_b, C_b, D = inputs[" ".join(NAMES)]
    half = [tensor.detach().half() * 60 for tensor in (x, B_f, C_f, B_b, C_b)]
    exact = [tensor.double() for tensor in half]
    steps = [dt_f, dt_b, A_f, A_b]
    y = video_ssd(half[0], *(tensor.float() for tensor in steps), *half[1:], D.float(), 3)
    right = video_ssd(exact[0], *steps, *exact[1:], D, 3)
    assert not y.isnan().any()
    assert torch.equal(y.isinf(), right.half().isinf())
    assert y.isinf().any()
    assert y.isfinite().any()


def double(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


INVALID: dict[str, dict[str, object]] = {  # regular expression of the message -> changed arguments
    r"segment_len=4\b.*\bL=15\b.*lengths \(B, T\)": {"segment_len": 4},
    r"segment_len=0\b.*\bL=15\b": {"segment_len": 0},
    r"segment_len=16\b.*\bL=15\b": {"segment_len": 16},
    r"segment_len='5'": {"segment_len": "5"},
    r"segment_len=True": {"segment_len": True},
    r"segment_len.*torch\.float32.*\(2, 2\).*B = 2": {"segment_len": torch.tensor([[7.5, 7.5]] * 2)},
    r"segment_len.*\(3, 1\).*B = 2": {"segment_len": torch.tensor([[15]] * 3)},
    r"segment_len.*\(2, 0\)": {"segment_len": torch.ones(2, 0, dtype=torch.long)},
    r"segment_len.*\[14, 16\].*L=15\b": {"segment_len": torch.tensor([[7, 7], [8, 8]]), "g0": None},
    r"segment_len.*-1 to 16\b": {"segment_len": torch.tensor([[16, -1], [8, 7]]), "g0": None},
    r"backend='cuda'.*'torch'": {"backend": "cuda"},
    r"backend='triton'.*CUDA.*'torch'": {"backend": "triton"},
    r"shift='both'.*'strict'.*'hydra'": {"shift": "both"},
    r"shift='hydra' with backend='torch'.*shift='strict'": {"shift": "hydra"},
    r"g0.*\(2, 4, 3, 4\).*\(2, 3, 4, 3, 4\)": {"g0": double(2, 4, 3, 4)},
    r"h0.*\(2, 4, 4, 3\).*\(2, 4, 3, 4\)": {"h0": double(2, 4, 4, 3)},
    r"dt_b.*\(2, 15, 1\).*\(2, 15, 4\)": {"dt_b": double(2, 15, 1)},
    r"A_f.*\(1,\).*\(4,\)": {"A_f": double(1)},
    r"D has.*\(2, 15\).*\(2, 15, 4\)": {"D": double(2, 15)},
    r"B_f.*\b3 groups.*\b4 heads": {name: double(2, 15, 3, 4) for name in ("B_f", "C_f")},
    r"B_f \(2, 15, 2, 4\).*B_b \(2, 15, 1, 4\)": {name: double(2, 15, 1, 4) for name in ("B_b", "C_b")},
    r"C_b.*torch\.float32.*x.*torch\.float64": {"C_b": torch.rand(2, 15, 2, 4)},
    r"x has.*torch\.int64": {"x": torch.ones(2, 15, 4, 3, dtype=torch.long)},
    r"x has.*\(2, 0, 4, 3\)": {"x": double(2, 0, 4, 3)},
    r"dt_f.*negative.*-1\b": {"dt_f": -torch.ones(2, 15, 4, dtype=torch.float64)},
    r"dt_b.*NaN": {"dt_b": double(2, 15, 4) * torch.nan},
    r"dt_f.*infinite": {"dt_f": torch.full((2, 15, 4), torch.inf, dtype=torch.float64)},
    r"chunk=-1\b": {"chunk": -1},
    r"chunk=2\.5": {"chunk": 2.5},
}


@pytest.mark.parametrize(("message", "changed"), INVALID.items(), ids=INVALID.keys())
def test_invalid_input_raises_one_paragraph(message: str, changed: dict[str, object]):
    with pytest.raises(ValueError, match=message) as caught:
        Inputs(3, 5, 4, 2).video_ssd(**changed)
    assert "\n" not in str(caught.value)


def test_reference_accepts_and_checks_the_same_inputs():
    inputs = Inputs(3, 5, 4, 2)
    half = {name: inputs[name][0].detach().bfloat16() for name in ("x", "B_f", "C_f", "B_b", "C_b")}
    (y, states), (right, right_states) = (inputs.video_ssd(backend, **half) for backend in ("reference", "torch"))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, right, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(states.float(), right_states.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"dt_f.*negative"):
        inputs.video_ssd("reference", dt_f=-inputs["dt_f"][0])


def test_forward_mode_raises():
    inputs = Inputs(2, 3, 2, 1)
    x = inputs["x"][0].detach()
    with pytest.raises(ValueError, match=r"forward-mode.*jacobian"):
        torch.func.jvp(lambda x: inputs.video_ssd(x=x)[0], (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match=r"forward-mode.*jacobian"):
        inputs.video_ssd(x=torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_docstring_examples():
    results = doctest.testmod(scan)
    assert results.attempted > 10
    assert not results.failed
