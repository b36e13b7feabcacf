"""The error taxonomy: an exception's class decides the exit code, the exit code what happens next.

Every message is one line: what went wrong, where, and what to do. `action` is the word that the policy table
uses: `human` (stop, somebody must change something), `restart` (try again, after a growing delay),
`restart_free` (try again at once, not counted), `rollback` (go back one checkpoint and skip the samples),
`stop` (the user asked for it).
"""

from __future__ import annotations


class MaskClipError(Exception):
    """Any failure that this project names. Built from one message, so that it can be pickled."""

    exit_code: int = 70
    action: str = "restart"
    agreed: bool = False
    """All ranks raise it together, so one of them says it for all."""


class ConfigError(MaskClipError):
    """A setting is wrong. The message ends with the key to change."""

    exit_code = 64
    action = "human"


class Superseded(ConfigError):
    """A newer attempt of the same run has begun, so this one ends."""


class DataError(MaskClipError):
    """The data are unusable as they are: broken, empty, or not what was promised."""

    exit_code = 65
    action = "human"


class ShardCorrupt(DataError):
    """A shard's bytes are not what its index or manifest says. Names the shard and the sample or offset."""


class ManifestMismatch(DataError):
    """A manifest is unreadable, of another kind, of a newer version, or not the one that was expected."""


class ObjectNotFound(DataError):
    """An object that must exist does not. Names its full address."""


class CheckpointIncompatible(MaskClipError):
    """A checkpoint is whole but cannot continue this run."""

    exit_code = 66
    action = "human"


class StorageUnavailable(MaskClipError):
    """The store did not answer or refused us. Names address, operation, attempts and last cause."""

    exit_code = 69
    action = "restart"


class Preempted(MaskClipError):
    """SIGTERM: the machine is taken away. The run continues elsewhere."""

    exit_code = 75
    action = "restart_free"
    agreed = True


class NonFinite(MaskClipError):
    """Loss or gradients became infinite or NaN."""

    exit_code = 76
    action = "rollback"
    agreed = True


class LossSpike(MaskClipError):
    """The loss jumped, and health.on_spike says to go back."""

    exit_code = 76
    action = "rollback"
    agreed = True


class DeviceFault(MaskClipError):
    """A rank computes or remembers something else than the others."""

    exit_code = 77
    action = "restart"


class Hang(MaskClipError):
    """No progress for too long, or a device or network fault that looks like it."""

    exit_code = 77
    action = "restart"


class Interrupted(MaskClipError):
    """Ctrl-C: the user stopped the run."""

    exit_code = 130
    action = "stop"
    agreed = True


def exit_code_of(exc: BaseException) -> int:
    """The exit code for `exc`: its own for a MaskClipError, 130 for Ctrl-C, 70 for everything else."""
    if isinstance(exc, MaskClipError):
        return exc.exit_code
    if isinstance(exc, KeyboardInterrupt):
        return Interrupted.exit_code
    return MaskClipError.exit_code
