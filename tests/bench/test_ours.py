from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashsae.architectures.batch_topk import BatchTopKSettings
from flashsae.bench import ours
from flashsae.bench.ours import Variant, build_ours, expected_rows, make_state
from flashsae.bench.problem import dense_squared_error, make_problem
from flashsae.bench.setups import Shape
from flashsae.precision import has_screen

CPU, SHAPE = torch.device("cpu"), Shape("x", 64, 12, 100, 5)
PROBLEM = make_problem(SHAPE, torch.float32, CPU)


@pytest.mark.parametrize(
    "variant",
    [
        *(Variant(), Variant("tf32"), Variant("float32"), Variant(moments="bf16"), Variant(clip_norm=1.0)),
        *(Variant("bf16-int8"), Variant("float32-int8")),
        *(Variant(arch="batch_topk"), Variant("float32", arch="batch_topk"), Variant(arch=BatchTopKSettings(k=5))),
    ],
    ids=str,
)
def test_steps_start_from_the_problem_and_fall(variant: Variant) -> None:
    problem = make_problem(SHAPE, torch.float32, CPU, arch=variant.arch)
    step, x = build_ours(problem, variant), problem.xs[0]
    losses = [float(step.run(x)) for _ in range(4)]
    if has_screen(variant.precision):  # a hundredth of the learning rate: little more than bf16 rounds
        assert losses == pytest.approx([losses[0]] * 4, rel=0.05)
    else:
        assert losses == sorted(losses, reverse=True)
    assert step.squared_error(losses[0], x) == pytest.approx(dense_squared_error(problem), rel=0.02)
    assert (step.expected is not None) == (variant in (Variant("float32"), Variant("float32-int8")))


def test_a_screened_step_knows_the_one_without_its_screen() -> None:
    assert Variant("bf16-int8", k_aux=7).unscreened == ("bf16", Variant("bf16", k_aux=7))
    assert Variant("float32-int8").unscreened == ("float32", Variant("float32"))
    assert all(Variant(name).unscreened is None for name in ("float32", "tf32", "bf16"))  # type: ignore[arg-type]


def test_codes_above_a_threshold_have_room_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ours, "room_of", lambda sae, device: asked.append(sae.architecture.name))
    assert build_ours(PROBLEM, Variant()).state.room is None
    assert asked == ["topk"]


def test_the_first_float32_update_is_that_of_torch_adam() -> None:
    step = build_ours(PROBLEM, Variant("float32"))
    assert "W_enc_T after a step: " in step.wrong_after_first()  # no step was done yet
    step.run(PROBLEM.xs[0])
    assert step.wrong_after_first() == ""


def test_another_learning_rate_is_found_wrong() -> None:
    right = build_ours(PROBLEM, Variant("float32"))
    config = replace(right.config, lr=1.1 * right.config.lr)
    step = replace(right, state=make_state(PROBLEM, config), config=config)
    step.run(PROBLEM.xs[0])
    assert "W_dec after a step: " in step.wrong_after_first()


def test_expected_rows_are_of_latents_that_fired() -> None:
    rows = expected_rows(PROBLEM, 1e-3)
    moved = (rows.W_enc_T - PROBLEM.W_enc_T[rows.latents]).abs().amax(1)
    assert len(rows.latents) > 10
    assert float(moved.min()) > 1e-4
    torch.testing.assert_close(rows.W_dec.norm(dim=1), torch.ones(len(rows.latents)))


def test_dead_latents_stay_dead_and_get_the_auxiliary_loss() -> None:
    problem = make_problem(SHAPE, torch.float32, CPU, tied=True, dead=20)
    step = build_ours(problem, Variant())
    before = step.state.sae.W_enc_T[:20].float().clone()
    for _ in range(3):
        step.run(problem.xs[0])
    assert step.config.k_aux == 20
    assert step.state.dead.mask().sum() == 20
    assert not torch.equal(before, step.state.sae.W_enc_T[:20].float())
