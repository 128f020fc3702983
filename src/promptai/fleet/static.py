"""Replicas from a list of URLs: servers that PromptAI neither starts nor stops.

A probe must never change the server. A health check that runs a prompt occupies a board's only slot for a
minute, and reading the metrics of a server that manages several models has been seen to load one. So a probe
sends only four requests, all ``GET``: ``/health`` every two seconds, and once the server is ready ``/props``,
``/v1/models`` and, unless it is a llama-server, ``/api/fleet``. Every fifth check reads the served models again,
because the server may have been restarted with another model between two checks. Requests in flight are not
read: such a count is outdated on arrival.

Each server has a probe task of its own, so that a dead board, which costs a full time limit, delays no other.
Another gateway (dialect ``promptai``) is one replica per model that it serves; see ``FleetResponse``.
"""

import asyncio
import re
from collections.abc import Callable, Container, Sequence
from typing import TypeVar

import msgspec

from promptai.engine.upstream import Upstream
from promptai.engine.url import EngineUrl
from promptai.errors import EngineDiedError, EngineError
from promptai.fleet.replica import Rates, Replica, State
from promptai.wire.llamaserver import Props
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import ModelList

T = TypeVar("T")

#: The pause between probes of a server that is down doubles up to this.
_LONGEST_PAUSE_S = 15.0
_LIMIT_S = 3.0
#: Status of servers without a health check; their list of models serves as one.
_NO_HEALTH_CHECK = frozenset({404, 405, 501})
_USABLE = frozenset(state.value for state in (State.COLD, State.LOADING, State.READY))
#: Time that the first publication waits for slow servers: it takes over from the source that it replaces.
_FIRST_ROUND_S = 1.0
#: Checks after which the served models are read again.
_LEARN_EVERY = 5


class StaticServer(msgspec.Struct, frozen=True):
    """
    The URL of one server, and settings that override what the server reports.

    Attributes:
        url: Scheme, host and port; a trailing ``/v1`` is ignored.
        name: Replica id; ``None``: host and port.
        model: Model to use; ``None``: the one that it serves.
        slots: Concurrent streams; ``None``: as reported, else 1.
    """

    url: str
    name: str | None = None
    model: str | None = None
    slots: int | None = None
    rates: Rates = Rates()
    capability: float | None = None

    @property
    def base_url(self) -> str:
        """URL of its API, without ``/v1``."""
        return EngineUrl.parse(self.url).base

    @property
    def replica_id(self) -> str:
        """
        Its name in the fleet.

        Raises:
            SettingsError: The URL is invalid.
        """
        url = EngineUrl.parse(self.url)
        return self.name or url.address


class FleetModel(msgspec.Struct, frozen=True):
    """
    A model of another gateway.

    Attributes:
        slots: Slots of its ready replicas; 0 while none is ready. Used only for a gateway that does not list its
            replicas, because a model that loads on demand has no ready replica until its first request.
        context: Context of one slot in tokens.
        capability: Rank of the model for ``auto``.
    """

    id: str
    slots: int = 1
    context: int | None = None
    capability: float | None = None


class FleetReplica(msgspec.Struct, frozen=True):
    """A replica of another gateway; ``dialect`` is ``promptai`` when it is behind a third gateway."""

    model: str
    state: str
    slots: int = 1
    dialect: str = ""

    @property
    def usable(self) -> bool:
        """Whether that gateway accepts requests for it, now or once it has loaded."""
        return self.dialect != "promptai" and self.state in _USABLE


class FleetResponse(msgspec.Struct, frozen=True):
    """
    Response to ``GET /api/fleet``: ``{"gateway": "promptai", "models": [{"id": …}], "replicas": [{"model": …}]}``.

    Replicas behind a third gateway are not counted: two gateways that know each other would count each other's slots
    for ever.
    """

    gateway: str
    models: list[FleetModel] = []
    replicas: list[FleetReplica] | None = None

    def slots(self, model: FleetModel) -> int:
        """Slots of all replicas that may answer for a model, those loaded on demand included."""
        if self.replicas is None:
            return max(0, model.slots)
        return sum(max(1, one.slots) for one in self.replicas if one.model == model.id and one.usable)


class _Props(Props, frozen=True):
    """``role`` is ``router`` for a llama-server that manages several models; its other fields are dummies."""

    role: str | None = None


class _ServedModel(msgspec.Struct, frozen=True):
    """A model that a server serves, as reported."""

    model: str
    slots: int
    context: int | None
    dialect: str
    suffix: str = ""
    capability: float | None = None


class _Unusable(Exception):  # noqa: N818  never leaves this module
    """The server cannot be used: the replica's state and the reason."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state = state
        self.reason = reason


class StaticSource:
    """
    Probes a list of servers and publishes their replicas.

    Args:
        period_s: Pause between two probes of a server that is not down.
    """

    def __init__(
        self, servers: Sequence[StaticServer], upstream: Upstream, *, name: str = "static", period_s: float = 2.0
    ) -> None:
        self.name = name
        self.configuration: object = (tuple(servers), period_s)
        self.exclusive = False
        self.replica_ids: Container[str] | None = None
        self._period_s = period_s
        self._probes = [_Probe(server, upstream) for server in servers]

    async def run(self, publish: Callable[[Sequence[Replica]], None]) -> None:
        """Probe every server periodically and publish the results."""
        probed: set[int] = set()
        loop = asyncio.get_running_loop()
        publish_at = loop.time() + _FIRST_ROUND_S

        def publish_all() -> None:
            if len(probed) == len(self._probes) or loop.time() >= publish_at:
                publish([replica for probe in self._probes for replica in probe.replicas])

        async def follow(number: int, probe: _Probe) -> None:
            pause_s = self._period_s
            while True:
                healthy = await probe.ask()
                probed.add(number)
                publish_all()
                if healthy:
                    pause_s = self._period_s
                await asyncio.sleep(pause_s)
                if not healthy:
                    pause_s = min(2 * pause_s, max(_LONGEST_PAUSE_S, self._period_s))

        async with asyncio.TaskGroup() as group:
            for number, probe in enumerate(self._probes):
                group.create_task(follow(number, probe))
            await asyncio.sleep(_FIRST_ROUND_S)
            publish_all()
            await loop.create_future()

    def touch(self, replica_id: str) -> None:
        """Do nothing: these servers never expire."""

    def wake(self, replica_id: str) -> None:
        """Do nothing: PromptAI does not start these servers."""


class _Probe:
    """One server and its last response."""

    def __init__(self, server: StaticServer, upstream: Upstream) -> None:
        self._server = server
        self._upstream = upstream
        self._url = server.base_url
        self._id = server.replica_id
        self._served: tuple[_ServedModel, ...] = (
            _ServedModel(model=server.model or "", slots=server.slots or 1, context=None, dialect="llama-server"),
        )
        self._learned = False
        self._timeouts = self._checks = 0
        # Not DOWN: a source that takes over from another would drop a board that is healthy but slow.
        self.replicas = self._as_replicas(State.LOADING, "not probed yet")

    async def ask(self) -> bool:
        """Probe the server now; False when it is down."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await self._check_health()
            self._checks += 1
            if not self._learned:
                self._served = await self._learn()
            elif self._served[0].dialect == "promptai" or self._checks >= _LEARN_EVERY:
                self._served = await self._learn_again()
            else:
                return self._healthy()
            self._learned, self._checks = True, 0
        except EngineDiedError:
            # A board that computes on all cores may miss one time limit; a refused connection is never a mistake.
            self._timeouts += 1
            if self._timeouts == 1 and loop.time() - began >= _LIMIT_S:
                return True
            return self._failed(State.DOWN, "does not answer")
        except EngineError as error:
            return self._failed(State.DOWN, error.message)
        except _Unusable as unusable:
            return self._failed(unusable.state, unusable.reason)
        return self._healthy()

    def _healthy(self) -> bool:
        self._timeouts = 0
        self.replicas = self._as_replicas(State.READY, "")
        return True

    def _failed(self, state: State, reason: str) -> bool:
        self._learned = False
        self.replicas = self._as_replicas(state, reason)
        return state is State.LOADING

    def _as_replicas(self, state: State, reason: str) -> tuple[Replica, ...]:
        server = self._server
        return tuple(
            Replica(
                id=f"{self._id}{served.suffix}",
                url=self._url,
                model=served.model,
                slots=max(1, server.slots or served.slots),
                context=served.context,
                state=state if served.slots or state is not State.READY else State.DOWN,
                reason=reason if served.slots or state is not State.READY else "no engine is ready",
                dialect=served.dialect,
                rates=server.rates,
                capability=served.capability if server.capability is None else server.capability,
            )
            for served in self._served
        )

    async def _check_health(self) -> None:
        """
        Check the health endpoint.

        Raises:
            _Unusable: The server is loading its model, or is not healthy.
        """
        reply = await self._upstream.get(self._url, "/health", limit_s=_LIMIT_S)
        if reply.status == 503:
            raise _Unusable(State.LOADING, "loading its model")
        if reply.status != 200 and reply.status not in _NO_HEALTH_CHECK:
            raise _Unusable(State.DOWN, _refusal(reply.status, "/health"))
        if reply.status != 200 and self._learned:
            await self._listed()

    async def _learn(self) -> tuple[_ServedModel, ...]:
        """
        Find out what kind of server it is and what it serves: at least one model.

        Raises:
            _Unusable: It does not serve the configured model, or serves several and none is configured.
        """
        server = self._server
        props = await self._json("/props", _Props)
        if props is not None and _is_single_model_engine(props):
            listed = [] if server.model or props.model_alias else await self._listed()
            name = server.model or props.model_alias or next(iter(listed), None) or props.model_path or ""
            context = props.default_generation_settings.n_ctx
            return (_ServedModel(_model_name(name), max(1, props.total_slots), context, "llama-server"),)
        fleet = await self._json("/api/fleet", FleetResponse)
        if fleet is not None and fleet.gateway == "promptai":
            served = [model for model in fleet.models if server.model in {None, model.id}]
            if not served:
                raise _Unusable(State.DOWN, f"does not serve {server.model}" if server.model else "serves no model")
            return tuple(
                _ServedModel(
                    model.id,
                    fleet.slots(model),
                    model.context,
                    "promptai",
                    suffix="" if server.model else f"/{model.id}",
                    capability=model.capability,
                )
                for model in served
            )
        models = [server.model] if server.model else await self._listed()
        if len(models) != 1:
            which = f"serves {len(models)} models; set model in [[fleet]]" if models else "serves no model"
            raise _Unusable(State.DOWN, which)
        return (_ServedModel(models[0], 1, None, "openai"),)

    async def _learn_again(self) -> tuple[_ServedModel, ...]:
        """Repeat ``_learn``; for an ``openai`` server, read only the list of models while it is unchanged."""
        first = self._served[0]
        if first.dialect == "openai" and (self._server.model or await self._listed() == [first.model]):
            return self._served
        return await self._learn()

    async def _listed(self) -> list[str]:
        """Return the listed models; raises ``_Unusable`` when there is no list."""
        reply = await self._upstream.get(self._url, "/v1/models", limit_s=_LIMIT_S)
        if reply.status != 200:
            raise _Unusable(State.DOWN, _refusal(reply.status, "/v1/models"))
        models = _decoded(reply.body, ModelList)
        if models is None:
            raise _Unusable(State.DOWN, "/v1/models returns no list of models")
        return [entry.id for entry in models.data or ()]

    async def _json(self, path: str, kind: type[T]) -> T | None:
        """Return the decoded response; ``None`` when it is missing or of another form."""
        reply = await self._upstream.get(self._url, path, limit_s=_LIMIT_S)
        if reply.status == 401:
            raise _Unusable(State.DOWN, _refusal(reply.status, path))
        return _decoded(reply.body, kind) if reply.status == 200 else None


def _decoded(body: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(body, type=kind)
    except MALFORMED:
        return None


def _is_single_model_engine(props: _Props) -> bool:
    """Whether a llama-server with one model sent this; other servers answer any path with HTTP 200."""
    known = (props.build_info, props.model_path, props.default_generation_settings.n_ctx)
    return props.role != "router" and known != (None, None, None)


def _refusal(status: int, path: str) -> str:
    key = "; check its API key" if status in {401, 403} else ""
    return f"HTTP {status} from {path}{key}"


def _model_name(name: str) -> str:
    """Return the model name; for a path, the file name without its suffix."""
    return re.split(r"[/\\]", name)[-1].removesuffix(".gguf") if name.endswith(".gguf") else name
