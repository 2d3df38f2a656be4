"""SAEs in models that run: codes by hookpoint, nesting, what is refused, and that nothing stays behind."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashsae
from flashsae import SAE, SAEConfig, SparseCode, ablate, clamp, hook, steer
from flashsae.errors import ConfigError, DtypeError, FlashSAEError, ShapeError
from helpers.hooked import at_hookpoint, sae_of


def test_codes_are_read(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    wanted = model(ids).logits
    with hook(model, {"h.1": sae}) as codes:
        assert torch.equal(model(ids).logits, wanted)  # bit for bit
    x = at_hookpoint(model, "transformer.h.1", ids)
    code = codes["h.1"]
    assert code.shape == (2, 7)
    assert not code.acts.requires_grad
    assert torch.equal(code.top_indices, sae.encode(x).top_indices)
    assert torch.equal(code.to_dense(), sae.encode(x).to_dense())
    assert codes.edited["h.1"].to_dense().equal(code.to_dense())
    assert list(codes) == ["h.1"]
    assert "h.1" in codes
    assert "h.2" not in codes
    assert repr(codes) == "Hooked(h.1)"


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "jump_relu", "relu", "gated", "abs_topk", "matryoshka"])
def test_codes_are_joined_over_the_steps_of_generate(arch: str, model: nn.Module, ids: Tensor) -> None:
    sae = sae_of(arch)
    with hook(model, {"h.1": sae}, steer(60, 0.5, at="prompt")) as codes:
        texts = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert len(codes.forwards("h.1")) == 4
    with hook(model, {"h.1": sae}, steer(60, 0.5, at=range(7))) as whole:
        model(texts[:, :-1])
    for found, wanted in ((codes["h.1"], whole["h.1"]), (codes.edited["h.1"], whole.edited["h.1"])):
        assert found.shape == (2, 10)
        torch.testing.assert_close(found.to_dense(), wanted.to_dense(), rtol=1e-4, atol=1e-5)


def test_a_new_text_begins_anew(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    with hook(model, {"h.1": sae}) as codes:
        model.generate(ids, max_new_tokens=3)
        model(ids[:1, :5])
        assert codes["h.1"].shape == (1, 5)
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:], past_key_values=cache)
        assert codes["h.1"].shape == (2, 7)
        model.transformer.h[1](torch.zeros(1, 3, 16))  # a module by itself
        assert codes["h.1"].shape == (1, 3)


def test_a_cache_from_before(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    with hook(model, {"h.1": sae}) as codes:
        model(ids[:, :2])
        cache = model(ids[:, :4], use_cache=True).past_key_values
    with hook(model, {"h.1": sae}, clamp(5, 9.0, at=-1)) as codes:
        model(ids[:1, :3])  # another text, which the cache does not go on with
        model(ids[:, 4:], past_key_values=cache)
    assert codes["h.1"].shape == (2, 3)
    assert (codes.edited["h.1"].to_dense()[0, :, 5] == 9).tolist() == [False, False, True]


def test_names_of_hookpoints(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    other = sae_of(seed=1)
    with hook(model, {"h.{0,2}": sae, "transformer.h.1:in": other}) as codes:
        model(ids)
    assert list(codes) == ["h.0", "h.2", "h.1:in"]
    assert torch.equal(codes["transformer.h.1:in"].acts, codes["h.1:in"].acts)
    x = at_hookpoint(model, "transformer.h.0", ids)
    assert torch.equal(codes["h.1:in"].to_dense(), other.encode(x).to_dense())
    assert torch.equal(codes["h.0"].to_dense(), sae.encode(x).to_dense())
    with pytest.raises(ConfigError, match=r"expected one of h\.0, h\.2, h\.1:in, got 'h\.\{0,2\}', which stands for"):
        codes["h.{0,2}"]


def test_hooks_are_nested_and_stand_beside_others(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    x = at_hookpoint(model, "transformer.h.1", ids)
    calls: list[str] = []
    handle = model.get_submodule("transformer.h.1").register_forward_hook(lambda *_: calls.append("other"))
    with hook(model, {"h.1": sae}, steer(3, 2.0)) as outer:
        with hook(model, {"h.1": sae}, steer(4, 1.0)) as inner:
            found = at_hookpoint(model, "transformer.h.1", ids)
        middle = at_hookpoint(model, "transformer.h.1", ids)
    handle.remove()
    assert len(calls) == 2
    torch.testing.assert_close(middle, x + 2 * sae.W_dec[3].detach())
    torch.testing.assert_close(found, middle + sae.W_dec[4].detach())
    assert torch.equal(inner["h.1"].to_dense(), sae.encode(middle).to_dense())
    assert torch.equal(outer["h.1"].to_dense(), sae.encode(x).to_dense())


def test_positions_may_come_first(sae: SAE) -> None:
    class LengthFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()

        def forward(self, inputs_embeds: Tensor) -> Any:
            return self.part(inputs_embeds.transpose(0, 1).contiguous()).transpose(0, 1)

    x, module = torch.randn(2, 5, 16), LengthFirst()
    with hook(module, {"part": sae}, clamp(3, 9.0, at=1)) as codes:
        found = module(x)
    dense = codes["part"].to_dense()
    assert torch.equal(dense, sae.encode(x).to_dense())
    assert (codes.edited["part"].to_dense()[0, :, 3] == 9).int().tolist() == [0, 1, 0, 0, 0]
    x[:, 1] += (9 - dense[:, 1, 3, None]) * sae.W_dec[3].detach()
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_hooks_are_removed_whatever_happens(
    error: type[BaseException], model: nn.Module, ids: Tensor, sae: SAE
) -> None:
    def stops(code: SparseCode) -> SparseCode:
        raise error("in a forward")

    wanted = model(ids).logits
    with pytest.raises(error, match="in a forward"), hook(model, {"h.1": sae}, stops):
        model(ids)
    assert torch.equal(model(ids).logits, wanted)
    with hook(model, {"h.1": sae}, steer(3, 9.0, at="new")):  # a forward that failed is over
        assert torch.equal(model(ids).logits, wanted)


def test_a_forward_that_failed_is_over(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    def stops(*_: object) -> None:
        raise ValueError("behind it")

    handle = model.get_submodule("transformer.h.2").register_forward_hook(stops)
    with hook(model, {"h.1": sae}) as codes:
        with pytest.raises(ValueError, match="behind it"):
            model(ids)
        handle.remove()
        model.transformer.h[1](torch.zeros(1, 3, 16))
        assert codes["h.1"].shape == (1, 3)


def test_it_is_entered_again_but_not_twice_at_once(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    hooked = hook(model, {"h.1": sae})
    for _ in range(2):
        with hooked as codes:
            model(ids)
    assert codes["h.1"].shape == (2, 7)
    with hooked, pytest.raises(ConfigError, match="hook: it is in use: make another one"):
        hooked.__enter__()


def test_compiled_models_run_uncompiled(tiny: ModuleType, ids: Tensor, sae: SAE) -> None:
    compiled = torch.compile(tiny.gpt2().eval(), backend="eager")
    with torch.no_grad():
        wanted = compiled(ids).logits
        with hook(compiled, {"h.1": sae}, steer(3, 2.0)) as codes:
            changed = compiled(ids).logits
        assert codes["h.1"].shape == (2, 7)
        assert not torch.equal(changed, wanted)
        assert torch.equal(compiled(ids).logits, wanted)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_checkpointed_modules_run_once_more(tiny: ModuleType, ids: Tensor, sae: SAE) -> None:
    part = tiny.gpt2()
    for module in part.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = []
    for settings in (None, {"use_reentrant": False}):
        if settings:
            part.gradient_checkpointing_enable(settings)
        with hook(part, {"h.1.mlp": sae}, steer(3, 2.0, at=2), gradients="latents") as codes:
            part.train()(ids).logits[:, -1, 3].sum().backward()
        found.append(codes["h.1.mlp"].acts.grad)
    assert torch.equal(*found)
    part.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.raises(flashsae.errors.GradientError, match="latents inside a reentrant checkpoint get none"),
        hook(part, {"h.1.mlp": sae}, gradients="model"),
    ):
        part(ids).logits.sum().backward()


def test_a_model_whose_weights_come_when_it_runs(tiny: ModuleType, ids: Tensor, sae: SAE, tmp_path: Path) -> None:
    import accelerate

    whole = tiny.gpt2().eval()
    with hook(whole, {"h.1": sae}, steer(3, 2.0)):
        wanted = whole(ids).logits
    spread = accelerate.disk_offload(whole, tmp_path, execution_device=torch.device("cpu"))
    with hook(spread, {"h.1": sae}, steer(3, 2.0)) as codes, torch.no_grad():
        assert torch.equal(spread(ids).logits, wanted)
    assert codes["h.1"].shape == (2, 7)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_an_adapter_is_no_other_model(tiny: ModuleType, ids: Tensor, sae: SAE) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny.gpt2().eval(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with hook(adapted, {"h.1": sae}, steer(3, 2.0)) as codes:
        adapted(ids)
    assert codes["h.1"].shape == (2, 7)


class Elsewhere(nn.Module):
    """Has a module that it does not run, and one that runs before another."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.late, self.early, self.shorter = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        return self.shorter(self.late(self.early(x))[:, 1:])


def test_a_module_that_did_not_run_is_told(sae: SAE) -> None:
    x, module = torch.randn(2, 5, 16), Elsewhere()
    with (
        hook(module, {"early": sae}) as codes,
        pytest.raises(ConfigError, match="early: no code is there before the model has run inside of the `with`"),
    ):
        codes["early"]
    with pytest.raises(ConfigError, match="hookpoint: idle did not run"), hook(module, {"idle": sae}, ablate(3)):
        module(x)
    hooked = hook(module, {"idle": sae})
    with pytest.raises(ConfigError, match="hookpoint: idle did not run when the model read its inputs"), hooked:
        module(x)
    with pytest.raises(ConfigError, match="hookpoint: idle did not run"):
        hooked["idle"]


def test_sites_that_do_not_fit_each_other(sae: SAE) -> None:
    x, module, transcoder = torch.randn(2, 5, 16), Elsewhere(), sae_of("transcoder:topk")
    with (
        pytest.raises(ConfigError, match="early ran before late, which it is made of; name them the other way round"),
        hook(module, {("late", "early"): transcoder}),
    ):
        module(x)
    with (
        pytest.raises(ShapeError, match=r"as many tokens at both hookpoints, got \[2, 5\] and \[2, 4\]"),
        hook(module, {("early", "shorter"): transcoder}),
    ):
        module(x)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"saes": {"h.7": 0}}, ConfigError, r"hookpoint: the model has no module 'h\.7'\. Near: .* layers are h\.0"),
        ({"saes": {"h.1:up": 0}}, ConfigError, r"expected a module path, for its output, or h\.1:in"),
        ({"saes": {}}, ConfigError, "saes: expected at least one"),
        ({"saes": {3: 0}}, DtypeError, "saes: expected module paths as keys, such as 'h.6', got 3"),
        ({"saes": ["h.1"]}, DtypeError, r"saes: expected a dict, \{hookpoint: sae\}, got list"),
        (
            {"saes": {"h.1": "my-sae"}},
            DtypeError,
            "saes: expected an SAE at 'h.1', as flashsae.load and .* got str",
        ),
        ({"saes": {"h.1": 0, "h.*": 0}}, ConfigError, r"one SAE for h\.1, got two \('h\.1' and 'h\.\*'\)"),
        ({"model": "gpt2"}, DtypeError, "model: expected a module, got str. Load it: AutoModel.from_pretrained"),
        ({"gradients": "all"}, ConfigError, 'gradients: expected "latents", "model" or None, got \'all\''),
        ({"edits": "ablate"}, DtypeError, "edits: expected what flashsae.ablate, .* got str"),
        ({"edits": {"h.2": ablate(3)}}, ConfigError, r"edits: expected one of h\.1, where there are SAEs, got 'h\.2'"),
        ({"saes": {"h.1": 0, "h.2": 0}, "edits": ablate(3)}, ConfigError, r"edits: expected a dict.* \(h\.1, h\.2\)"),
        ({"edits": [ablate(64)]}, ShapeError, "ablate: expected latents of h.1 from 0 to 63, got 64"),
        ({"error": "most"}, ConfigError, "at: expected"),
        ({"saes": {"h.0, h.1, h.2": 1}}, ConfigError, "expected 2 hookpoints for a TopK transcoder, of in and out"),
        ({"saes": {"h.*, h.1": 1}}, ConfigError, "patterns that stand for equally many hookpoints, got 3 and 1"),
    ],
)
def test_what_cannot_be_hooked_is_refused(
    given: dict[str, Any], error: type[FlashSAEError], message: str, model: nn.Module, sae: SAE
) -> None:
    saes = given.get("saes", {"h.1": 0})
    if isinstance(saes, dict):
        saes = {
            key: [sae, sae_of("transcoder:topk")][value] if value in (0, 1) else value for key, value in saes.items()
        }
    with pytest.raises(error, match=message) as caught:
        hook(**{"model": model, **given, "saes": saes})
    assert "\n" not in str(caught.value)


def test_widths_and_positions_are_looked_at_when_it_runs(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    wide = SAE(SAEConfig(32, 64, 4)).eval()
    with (
        pytest.raises(
            ShapeError, match=r"h\.1: expected activations \[\.\.\., 32\], as the SAE takes them, got \[2, 7, 16\]"
        ),
        hook(model, {"h.1": wide}),
    ):
        model(ids)
    with (
        pytest.raises(ShapeError, match=r"h\.1: steer\(3, 1, at=\[7\]\): no text had a position 7; the longest had 7"),
        hook(model, {"h.1": sae}, steer(3, 1.0, at=7)),
    ):
        model(ids)
    with pytest.raises(ShapeError, match=r"h\.1: error: no text had a position 9"), hook(model, {"h.1": sae}, error=9):
        model(ids)
    with hook(model, {"h.1": sae}, steer(3, 1.0, at=20)):
        model.generate(ids, max_new_tokens=3)  # may end before it
    with (
        pytest.raises(ShapeError, match=r"all positions that the model reads.* got \[2, 1, 16\] from lm_head:in"),
        hook(model, {"lm_head:in": sae}, steer(3, 1.0, at=-1)),
    ):
        model.generate(ids, max_new_tokens=3)


def test_copies_of_a_model_are_refused(model: nn.Module, sae: SAE) -> None:
    with pytest.raises(ConfigError, match="DataParallel runs copies of a model, which hooks do not see"):
        hook(nn.DataParallel(model), {"h.1": sae})
