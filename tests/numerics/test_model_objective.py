"""Laws of one step's forward and backward."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import model.heads
import model.text
from model.config import ModelConfig
from model.losses import SingleProcess
from model.masking import corrupt_tokens, split_patches
from model.objective import Objective, Output
from model.teacher import Teacher
from model.text import caption_lengths, cut_to_longest, encode_packed, encode_padded
from tests.unit.model.samples import (
    gradients,
    make_batch,
    make_config,
    make_pair,
    make_tokens,
    relative_error,
)

TEMPERATURE = 0.05


def step(objective: Objective, teacher: Teacher | None, batch: dict[str, Tensor]) -> Output:
    objective.zero_grad(set_to_none=True)
    output = objective(batch, teacher, TEMPERATURE, SingleProcess())
    output.loss.backward()
    return output


def test_same_inputs_give_the_same_bits():
    config = make_config()
    batch = make_batch(config, 6)
    results = []
    for _ in range(2):
        objective, teacher = make_pair(config)
        output = step(objective, teacher, batch)
        results.append((output.loss, gradients(objective)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_building_a_model_draws_nothing_from_the_callers_generator():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_pair(make_config())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("distill_weight", [0.0, 0.05])
@pytest.mark.parametrize("mlm_weight", [0.0, 0.05])
def test_every_parameter_learns(distill_weight: float, mlm_weight: float):
    config = make_config(distill_weight, mlm_weight)
    objective = Objective(config, seed=1)
    teacher = make_pair(config)[1] if distill_weight else None
    output = step(objective, teacher, make_batch(config, 6))
    assert all(gradient.isfinite().all() for gradient in gradients(objective).values())
    without = [name for name, gradient in gradients(objective).items() if not gradient.any()]
    assert without == []
    assert all(parameter.dim() >= 1 for parameter in objective.parameters())
    on = {"image_text", "text_image"} | ({"distill"} if distill_weight else set())
    assert output.terms.keys() == on | ({"mlm"} if mlm_weight else set())


@pytest.mark.parametrize("target", ["codewords", "features", "pixels"])
@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
@pytest.mark.parametrize("text_pass", ["own", "shared"])
def test_every_parameter_learns_in_every_variant(target, contrast, text_pass):
    config = make_config()
    config = replace(
        config,
        contrastive=contrast,
        distill=replace(config.distill, target=target),
        mlm=replace(config.mlm, text_pass=text_pass),
    )
    objective = Objective(config, seed=1)
    teacher = Teacher(config) if config.distill.needs_teacher else None
    if teacher is not None:
        teacher.load_student(objective)
    output = step(objective, teacher, make_batch(config, 6))
    without = [name for name, gradient in gradients(objective).items() if not gradient.any()]
    assert without == []
    contrast_terms = {"pairs"} if contrast == "sigmoid" else {"image_text", "text_image"}
    assert output.terms.keys() == contrast_terms | {"distill", "mlm"}
    assert (output.centre_K is not None) == (target == "codewords")


def with_depth(config: ModelConfig, **vision: float) -> ModelConfig:
    return replace(config, vision=replace(config.vision, **vision))  # type: ignore[arg-type]


def test_every_parameter_learns_with_layer_scale_stochastic_depth_and_patch_dropout():
    config = with_depth(make_config(), layer_scale=0.1, stochastic_depth=0.3, patch_dropout=0.5)
    output = step(*(pair := make_pair(config)), make_batch(config, 8))
    assert output.loss.isfinite()
    assert [name for name, gradient in gradients(pair[0]).items() if not gradient.any()] == []


def test_a_skipped_branch_is_the_identity_for_its_sample_alone():
    config = with_depth(make_config(), layer_scale=0.5)
    tower = Objective(config, seed=1).vision
    images = make_batch(config, 3)["image"]
    factors = torch.ones(config.vision.layers, 2, 3)
    factors[:, :, 1] = 0
    tokens = tower(images, None, factors)
    assert torch.allclose(tokens[[0, 2]], tower(images)[[0, 2]], atol=1e-6)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith(("attention_scale", "mlp_scale")):
                parameter.zero_()
    assert torch.allclose(tokens[1], tower(images)[1], atol=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_bits(every: int):
    config = with_depth(make_config(), stochastic_depth=0.3)
    batch = make_batch(config, 5)
    results = []
    for recompute_every in (0, every):
        objective, teacher = make_pair(replace(config, recompute_every=recompute_every))
        results.append((step(objective, teacher, batch).loss, gradients(objective)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_regression_targets_are_normalised_features_or_pixels_at_masked_patches():
    for target in ("features", "pixels"):
        config = make_config()
        config = replace(config, distill=replace(config.distill, target=target))
        objective = Objective(config, seed=1)
        batch = make_batch(config, 4)
        visible, masked = split_patches(
            objective.seed, batch["epoch"], batch["id"], config.vision.num_patches, config.num_visible
        )
        teacher = None
        if target == "features":
            teacher = Teacher(config)
            teacher.load_student(objective)
            patches = teacher.vision(batch["image"])[:, 1:].double()
        else:
            patches = images_in_patches(batch["image"], config.vision.patch_size).double()
        predicted = objective.predictor(
            objective.decoder(objective.vision(batch["image"], visible), visible, masked)
        )
        expected = torch.zeros((), dtype=torch.float64)
        for sample in range(4):
            for place, patch in enumerate(masked[sample].tolist()):
                values = patches[sample, patch]
                wanted = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
                expected += (predicted[sample, place].double() - wanted).square().mean()
        expected /= 4 * masked.shape[1]
        assert relative_error(step(objective, teacher, batch).terms["distill"], expected) <= 1e-5


def images_in_patches(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, P, 3 * size * size], by slicing."""
    side = images.shape[2] // size
    patches = [
        images[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten(1)
        for row in range(side)
        for column in range(side)
    ]
    return torch.stack(patches, dim=1)


def test_the_total_is_the_weighted_sum():
    config = make_config(0.3, 0.2)
    output = step(*make_pair(config), make_batch(config, 6))
    terms = {name: float(term) for name, term in output.terms.items()}
    expected = terms["image_text"] + terms["text_image"] + 0.3 * terms["distill"] + 0.2 * terms["mlm"]
    assert float(output.total) == pytest.approx(expected, rel=1e-6)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_no_gradient_reaches_the_teacher():
    config = make_config()
    objective, teacher = make_pair(config)
    teacher.requires_grad_(True)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    step(objective, teacher, make_batch(config, 6))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_targets_are_the_teachers_centred_soft_codewords_at_masked_patches():
    config = make_config()
    objective, teacher = make_pair(config)
    teacher.centre.copy_(torch.linspace(-0.1, 0.1, config.distill.codewords))
    batch = make_batch(config, 5)
    batch["weight"][3] = 0
    output = step(objective, teacher, batch)

    with torch.no_grad():
        visible, masked = split_patches(1, batch["epoch"], batch["id"], 16, 4)
        everywhere = teacher(batch["image"], torch.arange(16).expand(5, 16)).double()
        student = objective.quantizer(
            objective.decoder(objective.vision(batch["image"], visible), visible, masked)
        )
    loss = entropy = torch.zeros((), dtype=torch.float64)
    centre, mean_target = torch.zeros(2, config.distill.codewords, dtype=torch.float64)
    for sample in (0, 1, 2, 4):
        for place, patch in enumerate(masked[sample].tolist()):
            logits = everywhere[sample, patch]
            target = torch.softmax((logits - teacher.centre.double()) / TEMPERATURE, dim=0)
            guess = torch.log_softmax(
                student[sample, place].double() / config.distill.student_temperature, dim=0
            )
            loss = loss - (target * guess).sum() / (4 * 12)
            entropy = entropy - (target * target.log()).sum() / (4 * 12)
            centre, mean_target = centre + logits / (4 * 12), mean_target + target / (4 * 12)
    use = torch.exp(-(mean_target * mean_target.log()).sum()) / config.distill.codewords
    assert relative_error(output.terms["distill"], loss) <= 1e-6
    assert relative_error(output.metrics["teacher_entropy"], entropy) <= 1e-5
    assert relative_error(output.metrics["codeword_use"], use) <= 1e-5
    assert output.centre_K is not None
    assert relative_error(output.centre_K, centre) <= 1e-5


def test_padding_of_captions_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    """Cut to the longest, padded to the context length, or packed as for xformers: same features, same
    predictions, same gradients."""
    config = make_config()
    objective, _ = make_pair(config)
    padded = make_tokens([3, 7, 1, 5], config)
    cut = cut_to_longest(padded, config.text)
    results = []
    for tokens, way in ((padded, encode_padded), (cut, encode_padded), (padded, encode_packed)):
        for user in (model.text, model.heads):
            monkeypatch.setattr(user, "encode", way)
        objective.zero_grad(set_to_none=True)
        epoch, ids = torch.zeros(4, dtype=torch.int64), torch.arange(4)
        corrupted, hidden = corrupt_tokens(1, epoch, ids, tokens, config.mlm.mask_ratio, config.text)
        states, pooled = objective.text(torch.cat([tokens, corrupted]))
        decoded = objective.text_decoder(states[4:], caption_lengths(tokens, config.text))
        logits = objective.mlm_head(decoded[hidden], objective.text.token_embedding.weight)
        features = objective.text_projection(pooled[:4])
        (features.square().sum() + logits.square().mean()).backward()
        grads = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        results.append((features, logits, grads))
    expected_features, expected_logits, expected_grads = results[0]
    for features, logits, grads in results[1:]:
        assert relative_error(features, expected_features) <= 1e-6
        assert relative_error(logits, expected_logits) <= 1e-6
        assert grads.keys() == expected_grads.keys()
        assert all(relative_error(grads[name], expected_grads[name]) <= 1e-5 for name in grads)


def test_bfloat16_is_near_float32():
    config = make_config()
    objective, teacher = make_pair(config)
    batch = make_batch(config, 6)
    exact = step(objective, teacher, batch)
    exact_gradients = gradients(objective)
    rounded_objective, rounded_teacher = (
        copy.deepcopy(objective).bfloat16(),
        copy.deepcopy(teacher).bfloat16(),
    )
    rounded = step(rounded_objective, rounded_teacher, batch)
    assert rounded.loss.dtype == torch.float32
    assert rounded_teacher.centre.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in (rounded.terms | rounded.metrics).values())
    assert rounded_objective.encode_image(batch["image"]).dtype == torch.float32
    assert rounded_objective.encode_text(batch["tokens"]).dtype == torch.float32
    assert relative_error(rounded.total, exact.total) <= 5e-3
    assert all(relative_error(rounded.terms[name], exact.terms[name]) <= 2e-2 for name in exact.terms)
    total = torch.cat([gradient.flatten() for gradient in exact_gradients.values()])
    rounded_total = torch.cat([gradient.flatten() for gradient in gradients(rounded_objective).values()])
    assert relative_error(rounded_total, total) <= 5e-2


def test_float_and_byte_images_are_the_same_picture():
    config = make_config()
    objective, _ = make_pair(config)
    image = make_batch(config, 3)["image"]
    features = objective.encode_image(image)
    assert relative_error(objective.encode_image(image.float() / 255), features) <= 1e-5
    assert torch.allclose(features.norm(dim=1), torch.ones(3))
