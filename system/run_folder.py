"""The run folder's own record: what makes a run the run that it is."""

import json
from typing import Any

from cluster.errors import CheckpointIncompatible, ManifestMismatch, ObjectNotFound
from cluster.store import ObjectStore
from system.config import TrainConfig, digest, identity, to_dict
from system.recipe import validate

RECORD = "config.json"


def describe_run(
    config: TrainConfig, dataset_digest: str, initial_weights: str | None = None
) -> dict[str, Any]:
    """What `config.json` and every checkpoint manifest say about the run."""
    description = {
        "config": to_dict(config),
        "identity": digest(identity(config)),
        "dataset": dataset_digest,
    }
    return description | ({"initial_weights": initial_weights} if initial_weights else {})


def claim_run(
    run: ObjectStore, config: TrainConfig, dataset_digest: str, initial_weights: str | None = None
) -> None:
    """Write the record of a new run, or check that this is the same run.

    Args:
        initial_weights: digest of the file that the run begins from, if any.

    Raises:
        ManifestMismatch: the data set is not the one that the run began with.
        CheckpointIncompatible: a key of the run's identity, or the weights that it begins from, differ.
    """
    description = describe_run(config, dataset_digest, initial_weights)
    if run.put_if_absent(RECORD, json.dumps(description, indent=1, sort_keys=True).encode()):
        return
    known = json.loads(run.get(RECORD))
    _check(run, known, config, dataset_digest)
    if known.get("initial_weights") != initial_weights:
        raise CheckpointIncompatible(
            f"{run.uri}: this run began from weights with SHA-256 {known.get('initial_weights')}, "
            f"{config.init.uri} has {initial_weights}; put those back or choose a new run.uri"
        )


def check_run(run: ObjectStore, config: TrainConfig, dataset_digest: str) -> None:
    """What `claim_run` would refuse of a run that is there already, its weights apart; writes nothing.

    Raises:
        ManifestMismatch, CheckpointIncompatible: as `claim_run`.
    """
    try:
        record = run.get(RECORD)
    except ObjectNotFound:
        return
    _check(run, json.loads(record), config, dataset_digest)


def _check(run: ObjectStore, known: dict[str, Any], config: TrainConfig, dataset_digest: str) -> None:
    if known["dataset"] != dataset_digest:
        raise ManifestMismatch(
            f"{run.uri}: this run began on the data set with manifest digest {known['dataset'][:12]}, "
            f"{', '.join(part.uri for part in config.data.parts)} has {dataset_digest[:12]}; "
            "give the same data set or a new run.uri"
        )
    if known["identity"] != digest(identity(config)):
        before, now = (
            identity(validate(TrainConfig, known["config"], f"{run.uri}/{RECORD}")),
            identity(config),
        )
        differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        changes = ", ".join(f"{key} (was {before.get(key)!r}, now {now.get(key)!r})" for key in differing)
        raise CheckpointIncompatible(
            f"{run.uri}: this run has another configuration: {changes}; "
            "keep these keys or choose a new run.uri"
        )


def recorded_initial_weights(run: ObjectStore) -> str | None:
    """Digest of the weights that the run began from; none if it began from none, or never began."""
    try:
        return json.loads(run.get(RECORD)).get("initial_weights")
    except ObjectNotFound:
        return None


def load_run_config(run: ObjectStore) -> TrainConfig:
    """The configuration that the run began with. Raises ObjectNotFound when `run` is no run folder."""
    try:
        record = run.get(RECORD)
    except ObjectNotFound:
        raise ObjectNotFound(
            f"{run.uri}: no {RECORD}, so this is not a run folder; correct the URI"
        ) from None
    return validate(TrainConfig, json.loads(record)["config"], f"{run.uri}/{RECORD}")
