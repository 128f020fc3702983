"""
Schemathesis generates valid and invalid requests from the OpenAPI document; every response must match it.

``SCHEMATHESIS_EXAMPLES=2000 SCHEMATHESIS_SEED=7 pytest tests/gateway/test_schema.py`` tries more, and other, requests.
"""

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from promptai.gateway.admission import AdmissionRules
from promptai.gateway.auth import Guard
from promptai.gateway.keys import KeyStore
from promptai.gateway.openapi import document
from promptai.gateway.streaming import Heartbeat
from promptai.router.selection import Alias, ModelNames
from support_serve import World
from support_site import FAST, Threaded, threaded

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "15"))
SEED = int(os.environ.get("SCHEMATHESIS_SEED", "1"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
API = schemathesis.openapi.from_dict(document())
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

pytestmark = pytest.mark.timeout(120 + EXAMPLES)


def boards() -> World:
    """Two models, one on two replicas; answers are short and immediate."""
    config = msgspec.structs.replace(FAST, answer_tokens=3, context=512, prefill_tps=1e7)
    other = msgspec.structs.replace(config, model="phi")
    return World({"a": config, "b": config, "c": other})


@pytest.fixture(scope="module")
def gateway() -> Iterator[Threaded]:
    """A gateway without keys."""
    rules = AdmissionRules(names=ModelNames(default="yi", aliases={"gpt-4o": Alias("phi", {"temperature": 0.5})}))
    with threaded(boards, heartbeat=Heartbeat(ping_s=0.1), rules=rules) as thread:
        yield thread


@pytest.fixture(scope="module")
def closed_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    """A gateway that requires a key."""
    store = KeyStore(tmp_path_factory.mktemp("keys") / "keys.json")
    store.add("a")
    with threaded(boards, guard=Guard(store, open=False)) as thread:
        yield thread


def is_ready(gateway: Threaded) -> bool:
    """Whether the gateway is ready, with all replicas."""
    return bool(requests.get(f"{gateway.url}/readyz", timeout=10).json() == {"status": "ready", "replicas": 3})


def name_an_existing_model(case: schemathesis.Case[Any]) -> None:
    """Make most requests name an existing model; random text never does."""
    body = case.body
    name = body.get("model") if isinstance(body, dict) else None
    if isinstance(body, dict) and isinstance(name, str) and len(name) % 4:
        body["model"] = ("yi", "phi", "auto")[len(name) % 4 - 1]


@seed(SEED)
@API.parametrize()
@SETTINGS
def test_every_response_matches_the_document(case: schemathesis.Case[Any], gateway: Threaded) -> None:
    name_an_existing_model(case)

    response = case.call(base_url=gateway.url, timeout=30)

    case.validate_response(response, checks=CHECKS)
    assert is_ready(gateway)


@seed(SEED)
@API.parametrize()
@settings(SETTINGS, max_examples=max(2, EXAMPLES // 5))
def test_every_response_without_a_key_matches_the_document(
    case: schemathesis.Case[Any], closed_gateway: Threaded
) -> None:
    response = case.call(base_url=closed_gateway.url, timeout=30)

    case.validate_response(response, checks=CHECKS)
    assert response.status_code != 200 or case.path in {"/healthz", "/readyz"}
