"""The gateway's state for its API, as plain values: models, fleet and queue."""

from collections.abc import Callable
from typing import Any

import msgspec

from promptai.fleet.replica import Replica, State
from promptai.router.schedule.dispatcher import Dispatcher
from promptai.router.selection import ModelNames


def models_view(dispatcher: Dispatcher, names: ModelNames, allowed: Callable[[str], bool]) -> dict[str, Any]:
    """Return ``GET /v1/models``: every permitted name for a request's model, including aliases and ``auto``."""
    snapshot = dispatcher.fleet_state.fleet.snapshot
    entries = []
    meant = {alias: found.model for alias, found in names.aliases.items()}
    for model in snapshot.models:
        if meant.get(model, model) != model:  # an alias of the same name stands for another model
            continue
        replicas = snapshot.of(model)
        entries.append({"id": model, "replicas": len(replicas), "context": _context(replicas)})
    own = [alias for alias, model in meant.items() if model == alias and model in snapshot.models]
    entries += [{"id": alias, "alias_of": model} for alias, model in meant.items() if alias not in own]
    if len(snapshot.models) > 1:
        entries.append({"id": "auto"})
    return {
        "object": "list",
        "data": [
            {"object": "model", "created": 0, "owned_by": "promptai", **entry}
            for entry in entries
            if allowed(str(entry["id"]))
        ],
    }


def fleet_view(dispatcher: Dispatcher, names: ModelNames, *, admin: bool) -> dict[str, Any]:
    """
    Return ``GET /api/fleet``: all replicas with their state and rates.

    Other gateways read ``models``. It excludes replicas that are gateways themselves: two gateways that know each other
    would count each other's slots for ever. Only ``admin`` sees URLs; every key with the scope infer sees ids, which
    are host:port for a remote replica without a name.
    """
    fleet_state = dispatcher.fleet_state
    snapshot = fleet_state.fleet.snapshot
    return {
        "gateway": "promptai",
        "version": snapshot.version,
        "strategy": dispatcher.strategy.name,
        "models": [_model(model, own) for model in snapshot.models if (own := _without_gateways(snapshot.of(model)))],
        "aliases": {alias: found.model for alias, found in names.aliases.items()},
        "replicas": [_replica(dispatcher, replica, admin=admin) for replica in snapshot.replicas],
    }


def queue_view(dispatcher: Dispatcher) -> dict[str, Any]:
    """Return ``GET /api/queue``: queued and running requests, with the ids of their keys and without any text."""
    fleet_state = dispatcher.fleet_state
    now, snapshot = fleet_state.now(), fleet_state.fleet.snapshot
    waiting = []
    for model in snapshot.models:
        for place, entry in enumerate(dispatcher.queued(model)):
            placement = entry.placement
            waiting.append(
                {
                    "model": model,
                    "place": place,
                    "key": entry.request.key,
                    "waited_s": round(now - entry.queued_at, 1),
                    "prompt_tokens": round(entry.request.prompt_tokens),
                    "for": placement.view.replica.id if placement is not None else None,
                    "left_s": round(placement.estimate.wait_s, 1) if placement is not None else None,
                }
            )
    running = [
        {
            "model": lease.request.model,
            "replica": lease.replica.id,
            "slot": lease.slot,
            "key": lease.request.key,
            "since_s": round(now - lease.started_at, 1),
            "generated_tokens": lease.generated,
            "stage": "decode" if lease.first_token_at is not None else "prefill",
        }
        for replica in snapshot.replicas
        for lease in fleet_state.leases(replica.id)
    ]
    return {"waiting": waiting, "running": running, "bound": dispatcher.limits.queue}


def _without_gateways(replicas: tuple[Replica, ...]) -> tuple[Replica, ...]:
    return tuple(replica for replica in replicas if replica.dialect != "promptai")


def _model(model: str, replicas: tuple[Replica, ...]) -> dict[str, Any]:
    ready = [replica for replica in replicas if replica.state is State.READY]
    return {
        "id": model,
        "slots": sum(replica.slots for replica in ready),
        "context": _context(replicas),
        "capability": max((r.capability for r in replicas if r.capability is not None), default=None),
    }


def _replica(dispatcher: Dispatcher, replica: Replica, *, admin: bool) -> dict[str, Any]:
    fleet_state = dispatcher.fleet_state
    book, now = fleet_state.book, fleet_state.now()
    step = book.decode_step_s(replica, 1)
    return {
        "id": replica.id,
        "url": replica.url if admin else None,
        "model": replica.model,
        "dialect": replica.dialect,
        "state": replica.state.value,
        "reason": replica.reason,
        "progress": replica.progress,
        "slots": replica.slots,
        "busy": fleet_state.running(replica.id),
        "context": replica.context,
        "capability": replica.capability,
        "rates": {
            "source": book.source(replica),
            "prefill_tps": book.prefill_tps(replica),
            "decode_tps": 1 / step if step else None,
            "cache_trust": round(book.trust(replica.id), 3),
        },
        "breaker": fleet_state.breaker(replica.id).state(now).value,
        "cached_chars": fleet_state.index.chars(replica.id),
        "expected": msgspec.to_builtins(replica.rates),
    }


def _context(replicas: tuple[Replica, ...]) -> int | None:
    return max((replica.context for replica in replicas if replica.context is not None), default=None)
