"""Section 4's attention and norm kernels against PyTorch's: values and gradients."""

import re
import sys

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t


def random_heads(length: int, heads: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries (2, T, heads, 8), keys and values (2, T, groups, 8), in the layout that projections produce."""
    torch.manual_seed(0)
    sizes = (heads, groups, groups)
    return [torch.randn(2, length, n * 8, dtype=dtype).unflatten(-1, (n, 8)).requires_grad_() for n in sizes]


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a fixed random projection of y."""
    torch.manual_seed(1)
    return list(torch.autograd.grad((y * torch.randn(y.shape, dtype=y.dtype)).sum(), inputs))


@pytest.mark.parametrize("length", [1, 7, 128, 300])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 2), (3, 1)])
def test_blocked_attention_is_causal_softmax_attention(length, heads, groups):
    qkv = random_heads(length, heads, groups, torch.float64)
    y, expected = t.attend_blocks(*qkv), t.attend_sdpa(*qkv)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(y, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_blocked_attention_without_gradients_keeps_no_probabilities():
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x), lambda x: x):
        y = t.attend_blocks(*random_heads(300, 4, 2, torch.float32))
    assert y.shape == (2, 300, 4, 8) and not saved


@pytest.mark.parametrize("major, knobs, chosen", [
    (9, {}, "fa3"), (8, {}, "fa2"), (12, {}, "fa2"), (7, {}, "sdpa"), (9, {"TRAIN_DTYPE": "fp32"}, "sdpa"),
    (9, {"MODEL_DIM": "1024", "NUM_HEADS": "2", "NUM_KV_HEADS": "1"}, "sdpa"),
])  # fmt: skip
def test_flash_attention_is_chosen_only_where_it_can_compute(monkeypatch, major, knobs, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(t, "attend_flash", lambda module: module)
    monkeypatch.setattr(t, "check_kernel", lambda *_: None)
    cfg = t.load_config({"RECIPE": "baseline", **knobs}).cfg
    assert t.choose_attention(cfg, torch.device("cuda"))[0] == chosen


# What a folder flash_attn on the path may hold, and the notice about it.
SOUND = """
from train_gpt import attend_sdpa
def flash_attn_func(q, k, v, causal):
    return attend_sdpa(q, k, v){0}
def flash_attn_varlen_func(q, k, v, bounds, _, longest, __, causal):
    import torch
    parts = torch.tensor_split(torch.stack([q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))]), bounds.tolist()[1:], 1)
    return torch.cat([attend_sdpa(*(x[None] for x in part)) for part in parts if part.shape[1]], 1)[0]
"""
FLASH = {
    "good": (SOUND.format(""), None), "doubled": (SOUND.format(" * 2"), r"RuntimeError: its results .* differ from PyTorch's by 100%"),
    "nan": (SOUND.format(" * float('nan')"), "differ from PyTorch's by nan%"), "oserror": ("raise OSError('libcudart.so.11: cannot open')", "OSError: libcudart"),
    "runtime": ("raise RuntimeError('built for another torch\\nlong')", "RuntimeError: built for another torch"),
    "version 1": ("def flash_attn_unpadded_func(): pass", "no attribute 'flash_attn_func'"), "empty": ("", "no attribute 'flash_attn_func'"),
    "no file": (None, "no attribute 'flash_attn_func'"), "dependency": ("import a_package_that_is_not_there", "No module named 'a_package"),
    "fails when called": (SOUND.format("") + "def flash_attn_func(*_, causal): raise RuntimeError('no kernel image')", "no kernel image"),
}  # fmt: skip


@pytest.mark.parametrize("what", FLASH)
def test_an_installed_kernel_that_is_of_no_use_is_named_and_passed_over(monkeypatch, tmp_path, what):
    text, notice = FLASH[what]
    (tmp_path / "flash_attn").mkdir()
    if text is not None:
        (tmp_path / "flash_attn" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    del sys.modules["flash_attn"]  # what the test imports goes when it ends
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    tried, check = [], t.check_kernel
    monkeypatch.setattr(
        t, "check_kernel", lambda kernel, cfg, _: tried.append(1) or check(kernel, cfg, torch.device("cpu"))
    )
    knobs = {"RECIPE": "baseline", "TRAIN_DTYPE": "bf16"}
    chosen, forced = (t.load_config(knobs | {"ATTENTION": name}).cfg for name in ("auto", "fa2"))
    name, _, notices = t.choose_attention(chosen, torch.device("cuda"))
    if notice is None:
        assert (name, notices) == ("fa2", ()) and tried
        return
    assert name == "sdpa"
    assert len(notices) == 1
    assert re.search(f"flash_attn is there and of no use .*{notice}", notices[0])
    with pytest.raises(t.ConfigError, match=rf"ATTENTION=fa2: .*{notice}.*; use ATTENTION=auto or ATTENTION=sdpa"):
        t.choose_attention(forced, torch.device("cuda"))


def test_what_an_older_torch_lacks_is_done_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # as in torch 2.9
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    name, kernel, notices = t.choose_attention(t.load_config({"RECIPE": "frontier"}).cfg, torch.device("cuda"))
    assert (name, kernel) == ("sdpa", t.attend_sdpa) and "torch.nn.attention.varlen" in notices[0]
    newer = t.cpu_features() & {"avx512_bf16", "amx_bf16", "avx2"}
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert t.cpu_features() & {"avx512_bf16", "amx_bf16", "avx2"} == (newer if sys.platform == "linux" else set())


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["fa3", "fa2"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 2)])
def test_flash_attention_is_the_same_attention(kernel, heads, groups):
    device = torch.device("cuda")
    cfg = t.load_config({"RECIPE": "baseline", "ATTENTION": kernel}).cfg
    try:
        attend = t.choose_attention(cfg, device).kernel
    except t.ConfigError as e:
        pytest.skip(str(e))
    q, k, v = (
        torch.randn(2, 300, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, groups, groups)
    )
    y, expected = attend(q, k, v), t.attend_sdpa(q, k, v)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    dy = torch.randn_like(y)
    for got, want in zip(
        *(torch.autograd.grad(out, (q, k, v), dy, retain_graph=True) for out in (y, expected)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_attention_after_a_cache_equals_attention_over_everything():
    q, k, v = random_heads(40, 4, 2, torch.float64)
    whole, tail = t.attend_blocks(q, k, v), t.attend_blocks(q[:, 33:], k, v)
    torch.testing.assert_close(tail, whole[:, 33:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_rms_norm_is_torchs(scale):
    torch.manual_seed(0)
    x = (scale * torch.randn(3, 5, 64)).requires_grad_()
    y, expected = t.rms_norm(x), F.rms_norm(x, (64,))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(y, [x]), gradients(expected, [x]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


def test_norm_and_attention_gradients_against_finite_differences(monkeypatch):
    monkeypatch.setattr(t.BlockedAttention, "ROWS", 4)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(t.UnitRMS.apply, x, atol=1e-4)
    assert torch.autograd.gradcheck(lambda *qkv: t.attend_blocks(*qkv), random_heads(10, 4, 2, torch.float64))
