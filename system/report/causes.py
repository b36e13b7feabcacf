"""What an incident usually comes from, and what to do: one line each, in full in docs/runbook.md."""

_BY_EVENT = {
    "step_refused": "a few in fp16 are the search for the loss scale; else look at samples and device",
    "window_given_up": "the next attempt leaves these slots out; look at them, and at the learning rate",
    "loss_spike": "a learning rate that is too high, or odd samples; see grad_norm and moment_ratio there",
    "spike_ahead": "Adam's second moment lags: a lower optimizer.lr or betas[1]",
    "memory_growth": "a leak, or a cache that is larger than thought: it ends in a killed rank",
    "sample_quarantined": "its file: maskclip dataset verify, or take it down",
    "hang": "the stacks in hangs/: the rank that stands outside of a collective holds up the others",
    "checkpoint_failed": "the store refused or was slow; the next save is due as ever",
    "checkpoint_quarantined": "files are not what the manifest says: storage; maskclip checkpoint repair",
    "checkpoint_prune_failed": "an old checkpoint stays and takes space; a later save tries again",
    "first_loss_off": "other versions, devices or data than before the restart",
    "evaluation_failed": "the data or the model; training went on",
    "events_dropped": "the store was away for long: this report has a gap",
}
_BY_EXIT = {
    64: "a setting: the reason names the key to change",
    65: "the data: maskclip dataset verify",
    66: "no checkpoint continues this run: maskclip checkpoint verify",
    69: "the store was away or refused: maskclip doctor URI",
    70: "no named error; look at the rank that ended first",
    76: "loss or gradient not finite again and again, or a spike: lower optimizer.lr, look at the samples",
    77: "a rank hung, was lost or differs: look at its node",
}
_KILLED = "SIGKILL, lack of memory or a lost machine: dmesg of its node"


def advice_for_event(name: str) -> str:
    """Empty for an event that is no incident."""
    return _BY_EVENT.get(name, "")


def advice_for_end(exit_code: int | None, *, killed: bool) -> str:
    """Of an attempt that ended; empty for an end that needs nobody."""
    return _KILLED if killed else _BY_EXIT.get(exit_code or 0, "")
