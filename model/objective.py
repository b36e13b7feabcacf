"""MaskCLIP as one module: what is trained, and the loss of one step.

Shapes: B batch of this rank, L tokens, D width, E shared space, V visible and M masked patches, F values of a
patch, K codewords, N hidden words, W vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import losses
from model.blocks import linear
from model.config import ModelConfig
from model.global_batch import Features, GlobalBatch, OnePass
from model.heads import ImageDecoder, MlmHead, Quantizer, TextDecoder
from model.losses import Collectives
from model.masking import branch_factors, corrupt_tokens, kept_patches, split_patches
from model.teacher import Teacher
from model.text import TextTower, caption_lengths, cut_to_longest
from model.vision import VisionTower, patch_pixels

INITIAL_TEMPERATURE = {"softmax": 0.07, "sigmoid": 0.1}  # CLIP's and SigLIP's
INITIAL_BIAS = -10.0  # SigLIP's: at the start nearly every pair is a no
MAX_LOGIT_SCALE = 100.0


class Output(NamedTuple):
    """Result of one step's forward. All but `loss` is detached, fp32 and the same on every rank."""

    loss: Tensor
    """Scalar to call backward on; its average over ranks is `total`."""
    total: Tensor
    """Scalar, loss of the global batch."""
    terms: dict[str, Tensor]
    """Scalars image_text and text_image (or pairs, with SigLIP's loss), distill, mlm of the global batch,
    unweighted; absent if off."""
    metrics: dict[str, Tensor]
    """Scalars logit_scale and, with codewords, teacher_entropy (nats) and codeword_use (0..1, effective share
    of the codewords: exp of the entropy of the batch's mean target, over K)."""
    centre_K: Tensor | None
    """Mean of the teacher's logits over the masked patches of the global batch; None without codewords."""


class Shares(NamedTuple):
    """What one pass adds to the step: this rank's shares of global sums, so passes can be added up."""

    loss: Tensor
    """Scalar with gradient."""
    terms: dict[str, Tensor]
    """Scalars, unweighted."""
    averages: dict[str, Tensor]
    """Of what is only reported: teacher_entropy, centre [K] and target [K], with codewords."""
    scale: Tensor
    """[1] factor on the cosines, detached; the same in every pass."""


class Captions(NamedTuple):
    """The captions of one pass, and N hidden words."""

    tokens_BL: Tensor
    corrupted_BL: Tensor
    hidden_N: Tensor
    """Places of the hidden words in the flattened tokens."""
    weight_N: Tensor
    """fp32 weights of the samples that they belong to."""

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[2] fp32 weight of the samples, and of the hidden words."""
        return torch.stack([batch["weight"].float().sum(), self.weight_N.sum()])


class MaskClip(nn.Module):
    """The two encoders and the shared space: all that inference needs."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        """Build with weights that are a function of `seed` (the caller's CPU generator is left alone)."""
        super().__init__()
        self.config = config
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            again = config.recompute_every
            self.vision = VisionTower(config.vision, config.attention, again)
            self.text = TextTower(
                config.text, config.attention, mask_token=config.mlm.weight > 0, recompute_every=again
            )
            # CLIP's init and no bias. Shape [1] and not a 0-d parameter, which DeepSpeed refuses in bf16.
            vision_width, text_width = config.vision.width, config.text.width
            self.image_projection = linear(vision_width, config.embed_dim, std=vision_width**-0.5, bias=False)
            self.text_projection = linear(text_width, config.embed_dim, std=text_width**-0.5, bias=False)
            temperature = INITIAL_TEMPERATURE[config.contrastive]
            self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / temperature)]))
            if config.contrastive == "sigmoid":
                self.logit_bias = nn.Parameter(torch.tensor([INITIAL_BIAS]))
            self._build_branches()

    def _build_branches(self) -> None:
        """What training adds."""

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 0..255 or float 0..1 -> [B, E] fp32 unit features."""
        return self.embed_tokens(self.vision(images_BCHW)[:, 0])

    def embed_tokens(self, tokens_XD: Tensor) -> Tensor:
        """[..., D] tokens of an image tower after its final norm -> [..., E] fp32 unit features."""
        return self._project(self.image_projection, tokens_XD)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """[B, L] int64 -> [B, E] fp32 unit features."""
        _, pooled_BD = self.text(cut_to_longest(tokens_BL, self.config.text))
        return self._project(self.text_projection, pooled_BD)

    @property
    def scale(self) -> Tensor:
        """[1] fp32 factor on the cosines, at most 100 (SLIP; at the limit its gradient is zero)."""
        return self.logit_scale.float().clamp(max=math.log(MAX_LOGIT_SCALE)).exp()

    @staticmethod
    def _project(projection: nn.Linear, tokens_XD: Tensor) -> Tensor:
        return F.normalize(projection(tokens_XD).float(), dim=-1)


class Objective(MaskClip):
    """L = L_I + L_T + lambda L_Dist + beta L_MLM (Eq. 8), with every pass of a step in one forward."""

    def _build_branches(self) -> None:
        config = self.config
        if config.distill.weight > 0:
            self.decoder = ImageDecoder(config.vision, config.distill, config.attention)
            width = config.vision.width
            if config.distill.target == "codewords":
                self.quantizer = Quantizer(width, config.distill)
            else:
                outputs = width if config.distill.target == "features" else config.vision.patch_values
                self.predictor = linear(width, outputs, std=0.02)
        if config.mlm.weight > 0:
            self.text_decoder = TextDecoder(config.text, config.mlm, config.attention)
            self.mlm_head = MlmHead(config.text)

    def forward(self, *args: Any, method: str = "loss", **kwargs: Any) -> Any:
        """Run `loss`, or the `method` of that name in its place: what an engine shards it gathers in calls of
        the module only."""
        return getattr(self, method)(*args, **kwargs)

    def loss(
        self,
        batch: Mapping[str, Tensor],
        teacher: Teacher | None,
        teacher_temperature: float,
        comm: Collectives,
    ) -> Output:
        """Loss of one batch, with every pass of a step.

        Args:
            batch: image [B, 3, H, W] (uint8 0..255 or float 0..1), tokens [B, L] int64, id and epoch [B]
                int64, weight [B] (0: the sample only fills up).
            teacher: None exactly if `config.distill.needs_teacher` is false.
            teacher_temperature: temperature of the teacher's soft codewords at this step.
            comm: the other ranks.
        """
        return self.report(self.shares(batch, teacher, teacher_temperature, OnePass(comm)), comm)

    def features(self, batch: Mapping[str, Tensor]) -> tuple[Features, Tensor]:
        """What the contrastive terms of `shares` are computed from, and the weights [2] of the samples and of
        their hidden words."""
        captions = self._captions(batch)
        states = captions.corrupted_BL if self.config.mlm.text_pass == "shared" else captions.tokens_BL
        _, pooled_BD = self.text(states)
        text_BE = self._project(self.text_projection, pooled_BD)
        return self._features(self._image_pass(batch), text_BE), captions.counts(batch)

    def shares(
        self,
        batch: Mapping[str, Tensor],
        teacher: Teacher | None,
        teacher_temperature: float,
        everyone: GlobalBatch,
    ) -> Shares:
        """This rank's shares, of all rows or of a micro-batch; arguments as `loss`."""
        # Text first: it waits for the device (lengths), and should not wait for the long image passes.
        captions = self._captions(batch)
        sample_factor, word_factor = everyone.factors(captions.counts(batch))
        share_B = batch["weight"].float() * sample_factor
        text_BE, text_terms = self._text_passes(captions, word_factor)
        features = self._features(self._image_pass(batch), text_BE)
        terms = everyone.contrast(features, share_B) | text_terms
        averages: dict[str, Tensor] = {}
        if self.config.distill.weight > 0:
            terms["distill"], averages = self._distill_pass(batch, share_B, teacher, teacher_temperature)
        weights = {"distill": self.config.distill.weight, "mlm": self.config.mlm.weight}
        loss = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        return Shares(loss, terms, averages, features.scale.detach())

    def _features(self, image_BE: Tensor, text_BE: Tensor) -> Features:
        bias = self.logit_bias.float() if self.config.contrastive == "sigmoid" else None
        return Features(image_BE, text_BE, self.scale, bias)

    def _image_pass(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, E] features of the images, or of the patches that patch dropout leaves."""
        vision, kept_BV = self.config.vision, None
        if vision.patch_dropout > 0:
            kept_BV = kept_patches(
                self.seed, batch["epoch"], batch["id"], vision.num_patches, self.config.num_kept
            )
        tokens_BPD = self.vision(batch["image"], kept_BV, self._branch_factors(batch, visible=False))
        return self.embed_tokens(tokens_BPD[:, 0])

    def _branch_factors(self, batch: Mapping[str, Tensor], *, visible: bool) -> Tensor | None:
        vision = self.config.vision
        if vision.stochastic_depth == 0:
            return None
        return branch_factors(
            self.seed, batch["epoch"], batch["id"], vision.layers, vision.stochastic_depth, visible=visible
        )

    def _captions(self, batch: Mapping[str, Tensor]) -> Captions:
        """Captions cut to the longest, and which of their words are hidden."""
        config = self.config
        tokens_BL = cut_to_longest(batch["tokens"], config.text)
        if config.mlm.weight == 0:
            none = batch["weight"].new_zeros(0)
            return Captions(tokens_BL, tokens_BL, none.long(), none.float())
        corrupted_BL, hidden_BL = corrupt_tokens(
            self.seed, batch["epoch"], batch["id"], tokens_BL, config.mlm.mask_ratio, config.text
        )
        hidden_N = hidden_BL.flatten().nonzero().squeeze(1)
        weight_N = batch["weight"].float()[hidden_N // tokens_BL.shape[1]]
        return Captions(tokens_BL, corrupted_BL, hidden_N, weight_N)

    def _text_passes(self, captions: Captions, word_factor: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, E] features of the captions, and the MLM term. Captions and masked captions go in one batch."""
        config = self.config
        tokens_BL, corrupted_BL, hidden_N, weight_N = captions
        if config.mlm.weight == 0:
            _, pooled_BD = self.text(tokens_BL)
            return self._project(self.text_projection, pooled_BD), {}
        shared = config.mlm.text_pass == "shared"
        states_BLD, pooled_BD = self.text(corrupted_BL if shared else torch.cat([tokens_BL, corrupted_BL]))
        lengths_B = caption_lengths(tokens_BL, config.text)
        decoded_BLD = self.text_decoder(states_BLD[-len(tokens_BL) :], lengths_B)
        decoded_ND = decoded_BLD.flatten(0, 1).index_select(0, hidden_N)
        logits_NW = self.mlm_head(decoded_ND, self.text.token_embedding.weight)
        mlm = losses.mlm(logits_NW, tokens_BL.flatten()[hidden_N], weight_N * word_factor)
        return self._project(self.text_projection, pooled_BD[: len(tokens_BL)]), {"mlm": mlm}

    def _distill_pass(
        self,
        batch: Mapping[str, Tensor],
        share_B: Tensor,
        teacher: Teacher | None,
        teacher_temperature: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The distillation term, and this rank's shares of the averages that are reported."""
        config = self.config
        visible_BV, masked_BM = split_patches(
            self.seed, batch["epoch"], batch["id"], config.vision.num_patches, config.num_visible
        )
        if config.distill.target == "pixels":
            seen_BMX = patch_pixels(batch["image"], masked_BM, config.vision)
        else:
            assert teacher is not None, "distillation needs a teacher"
            seen_BMX = teacher(batch["image"], masked_BM)
        tokens_BVD = self.vision(batch["image"], visible_BV, self._branch_factors(batch, visible=True))
        decoded_BMD = self.decoder(tokens_BVD, visible_BV, masked_BM)
        if config.distill.target != "codewords":
            return losses.regression(self.predictor(decoded_BMD), seen_BMX, share_B), {}
        assert teacher is not None
        targets_BMK = losses.teacher_targets(seen_BMX, teacher.centre, teacher_temperature)
        logits_BMK = self.quantizer(decoded_BMD)
        term = losses.distill(logits_BMK, targets_BMK, config.distill.student_temperature, share_B)
        entropy_BM = torch.special.entr(targets_BMK).sum(dim=-1)
        return term, {
            "teacher_entropy": share_B @ entropy_BM.mean(dim=1),
            "centre": share_B @ seen_BMX.mean(dim=1),
            "target": share_B @ targets_BMK.mean(dim=1),
        }

    @staticmethod
    def report(shares: Shares, comm: Collectives) -> Output:
        """Everything that is said about the global batch, summed over ranks in one call."""
        loss, terms, averages, scale = shares
        named = {"total": loss, **terms, **averages}
        flat = comm.sum(torch.cat([share.detach().reshape(-1) for share in named.values()])) / comm.size
        parts = flat.split([share.numel() for share in named.values()])
        whole = {
            name: part.view(share.shape) for (name, share), part in zip(named.items(), parts, strict=True)
        }
        metrics = {"logit_scale": scale.squeeze(0)}
        if averages:
            target_K = whole["target"]
            metrics["teacher_entropy"] = whole["teacher_entropy"]
            metrics["codeword_use"] = torch.special.entr(target_K).sum().exp() / target_K.numel()
        return Output(
            loss, whole["total"], {name: whole[name] for name in terms}, metrics, whole.get("centre")
        )
