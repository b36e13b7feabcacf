"""Where does the time of our step go, and how near is each part to the processor's matrix peak?

    python -m benchmarks.step_profile --preset vit_b_16 --batch 8

Every part is run alone, forward and backward (the teacher forward only), on one thread in fp32, in turns with
the others and with a plain product of two matrices, which is the peak. FLOPs are by formula
(`model/flops.py`): backward counts twice the forward. The optimizer and the teacher's average move memory and
multiply next to nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, machine
from benchmarks.step_speed import caption_words
from model import contrastive
from model.config import preset
from model.flops import flops_per_pair
from model.losses import SingleProcess
from model.masking import corrupt_tokens, split_patches
from model.objective import Objective
from model.teacher import Teacher, ema_update_
from model.text import caption_lengths, cut_to_longest
from system.config import OptimizerConfig
from system.engine.optim import build_optimizer
from tests.unit.model.samples import make_tokens

_SIDE = 1536
COMM = SingleProcess()


def parts(name: str, batch: int) -> dict[str, tuple[Callable[[], object], float]]:
    """What to run, and its FLOPs, by part."""
    config, words = preset(name), caption_words(batch)
    side, generator = config.vision.image_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    objective, teacher = Objective(config, seed=0), Teacher(config)
    teacher.load_student(objective)
    optimizer = build_optimizer(objective, OptimizerConfig())
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    epoch, ids, share = torch.zeros(batch).long(), torch.arange(batch), torch.full((batch,), 1 / batch)
    tokens = cut_to_longest(make_tokens(words, config), config.text)
    corrupted, hidden = corrupt_tokens(0, epoch, ids, tokens, config.mlm.mask_ratio, config.text)
    places = hidden.flatten().nonzero().squeeze(1)
    lengths = caption_lengths(tokens, config.text)
    visible, masked = split_patches(0, epoch, ids, config.vision.num_patches, config.num_visible)
    with torch.no_grad():
        seen = objective.vision(images, visible)
        states = objective.text(corrupted)[0]
        features = [objective.encode_image(images), objective.encode_text(tokens)]
    followed = dict(objective.named_parameters())
    averaged = [(p, followed[name].detach()) for name, p in teacher.named_parameters()]

    def text_decoder() -> None:
        decoded = objective.text_decoder(states.clone().requires_grad_(), lengths).flatten(0, 1)[places]
        objective.mlm_head(decoded, objective.text.token_embedding.weight).sum().backward()

    def image_decoder() -> None:
        decoded = objective.decoder(seen.clone().requires_grad_(), visible, masked)
        objective.quantizer(decoded).sum().backward()

    def contrast() -> None:
        image, text = (x.clone().requires_grad_() for x in features)
        terms = contrastive.info_nce(image, text, objective.scale, share, COMM)
        (terms[0] + terms[1]).backward()

    def average() -> None:
        with torch.no_grad():
            ema_update_([t for t, _ in averaged], [s for _, s in averaged], 0.999)

    flops = flops_per_pair(config, tokens.shape[1], len(places) / batch)
    return {
        "student, whole image": (lambda: objective.encode_image(images).sum().backward(), 3 * flops.vision),
        "student, visible patches": (
            lambda: objective.vision(images, visible).sum().backward(),
            3 * flops.vision_visible,
        ),
        "teacher": (lambda: teacher(images, masked), flops.teacher),
        "image decoder, quantizer": (image_decoder, 3 * flops.image_decoder),
        "captions": (lambda: objective.encode_text(tokens).sum().backward(), 3 * flops.text),
        "masked captions": (lambda: objective.text(corrupted)[0].sum().backward(), 3 * flops.text_masked),
        "text decoder, vocabulary": (text_decoder, 3 * flops.text_decoder),
        "contrastive loss": (contrast, 8.0 * batch * config.embed_dim),
        "AdamW": (optimizer.step, 0.0),
        "teacher's average": (average, 0.0),
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--preset", default="vit_b_16")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    matrix = torch.randn(_SIDE, _SIDE)
    runs = parts(options.preset, options.batch)
    runs["peak"] = (lambda: matrix @ matrix, 2.0 * _SIDE**3 / options.batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name, (run, _) in runs.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    rate = {name: options.batch * flops / middle[name] for name, (_, flops) in runs.items()}
    whole = sum(middle.values()) - middle["peak"]
    work = options.batch * sum(flops for name, (_, flops) in runs.items() if name != "peak")
    table = Table("part", "ms", "% of the step", "GFLOP", "% of the FLOPs", "GFLOP/s", "% of the peak")
    for name, (_, flops) in runs.items():
        part = name != "peak"
        table.add_row(
            name,
            f"{1e3 * middle[name]:.1f}",
            f"{100 * middle[name] / whole:.1f}" if part else "",
            f"{options.batch * flops / 1e9:.1f}",
            f"{100 * options.batch * flops / work:.1f}" if part else "",
            f"{rate[name] / 1e9:.1f}",
            f"{100 * rate[name] / rate['peak']:.0f}",
        )
    console = Console(width=120)
    console.print(f"A step of {options.preset}, batch {options.batch}, fp32, one thread, CPU time")
    console.print(table)
    console.print(f"the whole step: {100 * work / whole / rate['peak']:.0f} % of the peak")
    about = machine(["torch"])
    console.print("; ".join(f"{k} {v}" for k, v in about.items()))
    if options.json is not None:
        document = {"about": about, "seconds": seconds, "rate": rate}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
