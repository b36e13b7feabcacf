// Which curves there are, in their order. A panel is shown when the run has its scalar.
import { bytes, duration, number, percent } from "./format.js";

const panel = (scalar, title, note = "", format = number) => ({ scalar, title, note, format });

export const PANELS = [
  panel("loss", "Loss", "weighted sum"),
  panel("pairs_per_second", "Throughput", "pairs/s"),
  panel("mfu", "MFU", "of the stated peak", percent),
  panel("step_seconds", "Step", "seconds"),
  panel("image_text", "Image to text", "nats"),
  panel("text_image", "Text to image", "nats"),
  panel("pairs", "Pairs", "sigmoid, nats"),
  panel("distill", "Self-distillation", "nats"),
  panel("mlm", "Masked words", "nats"),
  panel("lr", "Learning rate"),
  panel("grad_norm", "Gradient norm", "before clipping"),
  panel("logit_scale", "Logit scale", "≤ 100"),
  panel("teacher_entropy", "Teacher entropy", "nats"),
  panel("codeword_use", "Codeword use", "share", percent),
  panel("teacher_cosine", "Teacher cosine"),
  panel("data_seconds", "Waiting for data", "seconds"),
  panel("rank_skew", "Slowest rank", "times the median"),
  panel("durable_age_seconds", "Age of durable state", "", duration),
  panel("loss_scale", "Loss scale", "fp16"),
  panel("host_bytes", "Host memory", "rank 0", bytes),
  panel("device_bytes", "Device memory", "rank 0", bytes),
];

export const shown = (scalars) => PANELS.filter((one) => scalars.includes(one.scalar));
