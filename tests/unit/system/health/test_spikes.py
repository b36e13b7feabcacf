"""What is computed about spikes, against its definition; and which windows a resume leaves out."""

import itertools

import pytest
import torch

from data_pipeline.loading.order import window_of
from system.engine.fragments import Fragment
from system.health.skips import counted, skipped_windows
from system.health.spikes import WATCHED, LossHistory, MomentRatio, ratios


def test_a_spike_is_far_above_the_median_and_does_not_hide_the_next_one():
    history = LossHistory(50)
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        loss = 5.0 - 0.005 * number + 0.05 * float(torch.randn((), generator=generator))
        assert history.deviations(loss) < 6, "a falling, noisy loss is no spike"
        history.add(loss)
    assert history.deviations(7.0) > 10
    history.add(7.0)
    assert history.deviations(7.0) > 10
    assert history.deviations(2.0) < 0


def test_few_or_equal_losses_are_no_spike():
    history = LossHistory(50)
    for _ in range(19):
        history.add(4.0)
        assert history.deviations(100.0) == 0.0
    history.add(4.0)
    assert history.deviations(4.001) < 1


@pytest.mark.parametrize("parts", [1, 3])
def test_the_moment_ratio_is_that_of_gradient_and_second_moment(parts: int):
    """However the layer is cut over ranks; g and v are taken from a real AdamW."""
    beta, eps = 0.98, 1e-8
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(7, 9, generator=generator))
    adam = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, beta), eps=eps)
    parameter.grad = torch.zeros_like(parameter)
    adam.step()
    moment = adam.state[parameter]["exp_avg_sq"]
    pieces = moment.view(-1).tensor_split(parts)
    watchers = [
        MomentRatio([Fragment(WATCHED["vision"], 0, {"exp_avg_sq": piece}, 0, 1)], beta, eps)
        for piece in pieces
    ]
    for step in range(2, 30):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * (8.0 if step == 29 else 1.0)
        adam.step()
        for watcher in watchers:
            watcher.measure(step)
        shares = [watcher.share(torch.device("cpu")).tolist() for watcher in watchers]
        found = ratios([sum(values) for values in zip(*shares, strict=True)])
        if step == 2:
            assert found == {}
            continue
        corrected = moment / (1 - beta**step)
        expected = float((parameter.grad.square() / corrected).mean().sqrt())
        assert found == {"vision": pytest.approx(expected, rel=1e-3)}
    assert expected > 2.3


def test_a_resume_from_any_checkpoint_leaves_out_the_same_windows():
    """The meta knows what lies behind, the records what lies ahead: from each step on the run is the same."""
    records = [{"window": window} for window in (2, 3, 7)]
    skipped = skipped_windows({}, 0, records)
    assert skipped == (2, 3, 7)
    whole = [window_of(step, skipped) for step in range(10)]
    assert whole == [0, 1, 4, 5, 6, 8, 9, 10, 11, 12]
    for step in range(10):
        again = skipped_windows(counted(step, skipped), step, records)
        assert [window_of(later, again) for later in range(step, 10)] == whole[step:]
    assert all(a < b for a, b in itertools.pairwise(whole))


def test_what_was_trained_is_not_skipped_afterwards():
    """A record of a window that the checkpoint has behind it, trained, changes nothing."""
    assert skipped_windows({"skipped_windows": []}, 5, [{"window": 3}, {"window": 5}]) == (5,)
