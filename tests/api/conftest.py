"""The whole API over stores in memory whose calls can be made to fail, for pytest-tornado's server and client."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from tornado.ioloop import IOLoop
from tornado.web import Application

from imgsvc.api import base
from imgsvc.api.app import make_app
from imgsvc.api.in_flight import InFlight
from imgsvc.config import load
from imgsvc.context import Context
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.store import MetadataStore
from tests.flaky import Faults, flaky_images, flaky_records
from tests.images.helpers import put


@dataclass
class Service:
    """`disk` and `base` are the stores themselves; the service sees them through the faults."""

    context: Context
    disk: ImageStore
    base: MetadataStore
    faults: Faults
    in_flight: InFlight

    def listed(self) -> list[Image]:
        return [entry.image for page in self.base.survey() for entry in page]

    def complete(self, body: bytes = b"bytes") -> Image:
        image = self.base.create(Image(id=new_id(), type=ImageType.KVM).started(len(body)))
        put(self.disk, image.id, body)
        return self.base.update(image.completed(len(body), hashlib.sha256(body).hexdigest()))


@pytest.fixture
def environ() -> dict[str, str]:
    """Settings of the test's own, as environment variables."""
    return {}


@pytest.fixture
def service(io_loop: IOLoop, tmp_path: Path, environ: dict[str, str]) -> Iterator[Service]:
    usual = {
        "IMGSVC_DATA_DIR": str(tmp_path / "data"),
        "IMGSVC_IMAGE_STORE_TYPE": "memory",
        "IMGSVC_METADATA_STORE_TYPE": "memory",
    }
    with closing(Context(load(None, {}, usual | environ), port=0)) as context:
        service = Service(context, context.images, context.records, Faults(), InFlight())
        context.images = flaky_images(service.disk, service.faults)
        context.records = flaky_records(service.base, service.faults)
        context._wire()
        context.settle()
        yield service
        io_loop.run_sync(context.finish_background)


@pytest.fixture(autouse=True)
def _short_lull(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client here that has stopped sending has done so for good."""
    monkeypatch.setattr(base, "LULL", 0.4)


@pytest.fixture
def app(service: Service) -> Application:
    return make_app(service.context, service.in_flight)
