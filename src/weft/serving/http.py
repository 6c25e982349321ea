"""The HTTP application: routes over a service; needs the extra ``serve``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

from weft.errors import MissingExtra

try:
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, Response
    from starlette.exceptions import HTTPException
except ImportError:
    raise MissingExtra("The HTTP server", "serve") from None

from . import schemas
from .guard import Guard, check_same_origin
from .inputs import FORMATS, Names, RequestError
from .listing import detail, lines
from .page import page
from .responses import Json, refusal
from .server import Server
from .service import Service
from .settings import Settings

log = logging.getLogger("weft.serving")

TOP = 10
"""Classes of an answer where a request does not say how many."""

Top = Annotated[
    int, Query(ge=1, le=100_000, description="At most so many classes, the best first.")
]
CODES = {404: "not_found", 405: "method_not_allowed"}
BAD = (400, 401, 408, 413, 415, 422, 500, 503)


def create_app(server: Server, settings: Settings | None = None) -> FastAPI:
    """The application; ``app.state.service`` is what its requests share.

    Args:
        server: runs tasks.
        settings: how to answer.

    Raises:
        MissingExtra: on import of this module, if the extra ``serve`` is not installed.
    """
    service = Service(server, settings or Settings())

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="weft",
        version=version("weft-share"),
        description="Many tasks on one resident base.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=life,
    )
    app.state.service = service
    app.add_middleware(
        Guard,
        token=service.settings.token,
        hosts=service.settings.hosts,
        metrics=service.metrics,
        closing=lambda: service.closing,
    )
    _add_refusals(app, service)
    _add_predictions(app, service)
    _add_tasks(app, service)
    _add_state(app, service)
    return app


def _add_refusals(app: FastAPI, service: Service) -> None:
    def refused(
        status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> Json:
        service.metrics.errors.labels(code).inc()
        return refusal(status, code, message, headers)

    @app.exception_handler(RequestError)
    async def _(_: Request, error: RequestError) -> Json:
        return refused(error.status, error.code, str(error), error.headers)

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> Json:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return refused(422, "invalid_input", f"{where}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> Json:
        code = CODES.get(error.status_code, "malformed")
        headers = dict(error.headers or {})
        return refused(error.status_code, code, f"{error.detail}.", headers)


def _add_predictions(app: FastAPI, service: Service) -> None:
    spec, rows = service.settings.inputs, service.settings.max_batch

    def body(names: Names) -> dict[str, Any]:
        return schemas.body_schema(spec, rows, names)

    @app.post(
        "/v1/tasks/{task}/predict",
        response_model=schemas.RowAnswers,
        responses=schemas.problems(404, *BAD),
        openapi_extra=body(Names.NONE),
    )
    async def predict(task: str, request: Request, top: Top = TOP) -> Response:
        """One task on one row or several: numbers as JSON, or images."""
        start = time.perf_counter()
        service.check_task(task)
        given = await service.read(request, Names.NONE)
        found = await service.run(request, service.per_row, given.x, [task] * len(given.x))
        return answered((await service.plain([found], top))[0], start)

    @app.post(
        "/v1/predict",
        response_model=schemas.RowAnswers,
        responses=schemas.problems(404, *BAD),
        openapi_extra=body(Names.PER_ROW),
    )
    async def predict_rows(request: Request, top: Top = TOP) -> Response:
        """A task of its own for each row."""
        start = time.perf_counter()
        given = await service.read(request, Names.PER_ROW)
        found = await service.run(request, service.per_row, given.x, given.tasks or ())
        return answered((await service.plain([found], top))[0], start)

    @app.post(
        "/v1/predict_all",
        response_model=schemas.AllAnswers,
        responses=schemas.problems(404, *BAD),
        openapi_extra=body(Names.OPTIONAL),
    )
    async def predict_all(request: Request, top: Top = TOP) -> Response:
        """Several tasks on the same rows; all of them if none are named."""
        start = time.perf_counter()
        given = await service.read(request, Names.OPTIONAL)
        tasks = service.server.task_names if given.tasks is None else given.tasks
        tasks = tuple(dict.fromkeys(tasks))
        service.check_answers(len(given.x), len(tasks))
        found = await service.run(request, service.every, given.x, tasks)
        return answered(await service.plain(found, top), start)

    def answered(answers: list[Any], start: float) -> Json:
        milliseconds = round(1000 * (time.perf_counter() - start), 3)
        return Json({"answers": answers, "milliseconds": milliseconds})


def _add_tasks(app: FastAPI, service: Service) -> None:
    server = service.server
    base = server.bank.base()["class"]

    @app.get(
        "/v1/tasks", response_model=schemas.TaskList, responses=schemas.problems(401, 422, 500)
    )
    async def tasks(
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        match: Annotated[str, Query(max_length=200, description="Part of the name.")] = "",
    ) -> Response:
        """The tasks in brief, a part of the list at a time."""
        names = [n for n in server.task_names if match.casefold() in n.casefold()]
        part = names[offset : offset + limit]
        found = await asyncio.to_thread(lines, server, part)
        return Json({"tasks": found, "total": len(names), "offset": offset})

    @app.get(
        "/v1/tasks/{task}",
        response_model=schemas.TaskDetail,
        responses=schemas.problems(401, 404, 422, 500),
    )
    async def one_task(task: str) -> Response:
        """One task, with its classes and what it owns layer by layer."""
        service.check_task(task)
        return Json(await asyncio.to_thread(detail, server, task))

    @app.post(
        "/v1/refresh",
        response_model=schemas.Refreshed,
        responses=schemas.problems(401, 500, 503),
    )
    async def refresh(request: Request) -> Response:
        """Look at the bank again for new, changed and removed tasks."""
        check_same_origin(request.headers)
        try:
            found = await asyncio.to_thread(server.refresh)
        except Exception as error:
            log.exception("The bank cannot be read.")
            message = "The bank cannot be read at present."
            after = {"Retry-After": "30"}
            raise RequestError(503, "task_unavailable", message, after) from error
        return Json(
            {
                "added": list(found.added),
                "removed": list(found.removed),
                "changed": list(found.changed),
            }
        )

    @app.get("/v1/info", response_model=schemas.ServerInfo, responses=schemas.problems(401, 500))
    async def info() -> Response:
        """What is served, and what requests may bring."""
        settings = service.settings
        spec, limits = settings.inputs, settings.limits
        return Json(
            {
                "tasks": len(server.task_names),
                "base": base,
                "input_shape": None if spec.shape is None else list(spec.shape),
                "input_type": spec.dtype,
                "image_types": list(FORMATS) if spec.reads_images else [],
                "max_rows": settings.max_batch,
                "max_body": limits.body,
                "max_pixels": limits.pixels,
                "max_answers": settings.max_answers,
                "half": server.half,
            }
        )


def _add_state(app: FastAPI, service: Service) -> None:
    html, policy = page()

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, responses=schemas.problems(500))
    async def index() -> Response:
        """The page to try it."""
        return HTMLResponse(html, headers={"content-security-policy": policy})

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=schemas.Status, responses=schemas.problems(500))
    async def healthz() -> Response:
        """Whether the process is alive."""
        return Json({"status": "ok"})

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", response_model=schemas.Status, responses=schemas.problems(500, 503))
    async def readyz() -> Response:
        """Whether requests are taken."""
        service.running()
        if service.closing:
            raise RequestError(503, "stopping", "The server is stopping.", {"Retry-After": "5"})
        return Json({"status": "ready"})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **schemas.problems(401, 500),
        },
    )
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
