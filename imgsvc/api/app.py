"""The routes, put together."""

from __future__ import annotations

from typing import Any

from tornado.web import Application, url

from imgsvc.api.base import UnknownPathHandler
from imgsvc.api.download import DownloadHandler
from imgsvc.api.health import HealthHandler, ReadyHandler
from imgsvc.api.images import ImageHandler, ImagesHandler
from imgsvc.api.in_flight import InFlight
from imgsvc.api.members import MembersHandler
from imgsvc.api.peers import CheckHandler, CopyHandler
from imgsvc.api.uploads import UploadHandler, UploadsHandler
from imgsvc.context import Context

Routes = list[Any]


def register_image_routes(prefix: str, context: Context, in_flight: InFlight) -> Routes:
    """The image routes below `prefix`, such as `/images`. A trailing slash is the same resource."""
    arguments = {"context": context, "in_flight": in_flight}
    return [
        url(rf"{prefix}/?", ImagesHandler, arguments),
        url(rf"{prefix}/([^/]+)/?", ImageHandler, arguments),
        url(rf"{prefix}/([^/]+)/download/?", DownloadHandler, arguments),
    ]


def make_app(context: Context, in_flight: InFlight) -> Application:
    """The whole service over `context`, for an HTTPServer."""
    arguments = {"context": context, "in_flight": in_flight}
    return Application(
        [
            *(_order_routes(arguments) if context.mirror is not None else ()),
            *register_image_routes("/images", context, in_flight),
            url(r"/uploads/?", UploadsHandler, arguments),
            url(r"/uploads/([^/]+)/?", UploadHandler, arguments),
            url(r"/members/?", MembersHandler, arguments),
            url(r"/healthz/?", HealthHandler, arguments),
            url(r"/readyz/?", ReadyHandler, arguments),
        ],
        default_handler_class=UnknownPathHandler,
        default_handler_args=arguments,
        log_function=_each_handler_logs_for_itself,
    )


def _order_routes(arguments: dict[str, Any]) -> Routes:
    """What members ask of each other: who has none has no such paths."""
    return [
        url(r"/peers/check/([^/]+)/?", CheckHandler, arguments),
        url(r"/peers/copy/([^/]+)/?", CopyHandler, arguments),
    ]


def _each_handler_logs_for_itself(_handler: object) -> None:
    """Tornado's line would say less, and nothing of a client that left."""
