"""What requests and responses look like, for the OpenAPI description."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from .inputs import FORMATS, InputSpec, Names


class ErrorBody(BaseModel):
    """Why there is no answer."""

    code: str = Field(description="A word for programs.")
    message: str = Field(description="A sentence for people.")


class ErrorAnswer(BaseModel):
    """A refusal or a failure."""

    error: ErrorBody


class ClassChance(BaseModel):
    """A class and how probable it is."""

    name: str
    probability: float | None


class TaskAnswer(BaseModel):
    """What one task says about one row."""

    task: str
    kind: str | None = Field(description="Kind of task; null for tasks of one's own.")
    classes: list[ClassChance] | None = Field(
        description="Most probable first; probabilities of a classification sum to 1, those of "
        "binary labels are independent. Null for other tasks."
    )
    output: Any = Field(description="The head's raw output; null stands for not finite numbers.")


class RowAnswers(BaseModel):
    """An answer for each row."""

    answers: list[TaskAnswer]
    milliseconds: float


class AllAnswers(BaseModel):
    """For each row, an answer of each task."""

    answers: list[list[TaskAnswer]]
    milliseconds: float


class TaskLine(BaseModel):
    """A task in brief."""

    name: str
    resident: bool
    pinned: bool
    problem: str | None = Field(description="Why it cannot be served; null if it can.")
    method: str | None
    kind: str | None
    classes: int | None
    own_parameters: int | None
    own_fraction: float | None
    own_bytes: int | None
    head_bytes: int | None
    metrics: dict[str, dict[str, float | None]]


class TaskList(BaseModel):
    """A part of the list of tasks."""

    tasks: list[TaskLine]
    total: int = Field(description="How many tasks match.")
    offset: int


class Layer(BaseModel):
    """A layer of the base, or one that the task adds."""

    site: str
    kind: str
    size: int = Field(description="Elements in the base.")
    own: int = Field(description="Elements that the task owns.")


class TaskDetail(TaskLine):
    """A task with its classes and what it owns, layer by layer."""

    class_names: list[str] | None
    layers: list[Layer]


class ServerInfo(BaseModel):
    """What the server serves, and what it takes."""

    tasks: int
    base: str
    input_shape: list[int] | None
    input_type: str
    image_types: list[str]
    max_rows: int
    max_body: int
    max_pixels: int
    max_answers: int = Field(description="Rows times tasks of one request.")
    half: bool


class Refreshed(BaseModel):
    """What a look at the bank found."""

    added: list[str]
    removed: list[str]
    changed: list[str]


class Status(BaseModel):
    """A word."""

    status: str


PROBLEMS = {
    400: "The body is malformed.",
    401: "The token is missing or wrong.",
    403: "The request comes from another site, or by a name that is not the server's.",
    404: "There is no such task.",
    405: "The method is not allowed here.",
    408: "The body took too long to arrive.",
    413: "The body or the image is too large.",
    415: "The type of the body is not taken.",
    422: "The request was understood and cannot be used.",
    500: "The server failed.",
    503: "Too many requests are waiting, the task cannot be loaded, or the server is stopping.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The responses of an operation that are not its answer."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in (403, *statuses):
        found[status] = {"model": ErrorAnswer, "description": PROBLEMS[status]}
        if status == 503:
            after = {"description": "Seconds to wait.", "schema": {"type": "string"}}
            found[status]["headers"] = {"Retry-After": after}
    return found


def body_schema(spec: InputSpec, max_rows: int, names: Names) -> dict[str, Any]:
    """The description of a request body.

    Args:
        spec: what the base takes.
        max_rows: in a request.
        names: of tasks, whether it has them.
    """
    listed = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    tasks = {} if names is Names.NONE else {"tasks": listed}
    document = {
        "type": "object",
        "properties": {"inputs": _inputs(spec, max_rows), **tasks},
        "required": ["inputs", *(tasks if names is Names.PER_ROW else ())],
        "additionalProperties": False,
    }
    content: dict[str, Any] = {"application/json": {"schema": document}}
    if spec.reads_images and names is not Names.PER_ROW:
        file = {"type": "string", "format": "binary"}
        files = {"type": "array", "items": file, "minItems": 1, "maxItems": max_rows}
        form = {
            "type": "object",
            "properties": {"image": files, **tasks},
            "required": ["image"],
            "additionalProperties": False,
        }
        content["multipart/form-data"] = {"schema": form}
        content |= {media: {"schema": file} for media in FORMATS}
    return {"requestBody": {"required": True, "content": content}}


def _inputs(spec: InputSpec, max_rows: int) -> dict[str, Any]:
    if spec.shape is None:
        return {"type": "array", "minItems": 1, "description": "Rows of numbers, rows first."}
    row: dict[str, Any] = {"type": "integer"} if spec.dtype == "int64" else {"type": "number"}
    limit = 2**63 - 1 if spec.dtype == "int64" else 3e38
    row |= {"minimum": -limit, "maximum": limit}
    for size in reversed(spec.shape):
        row = {"type": "array", "items": row, "minItems": size, "maxItems": size}
    rows = {"type": "array", "items": row, "minItems": 1, "maxItems": max_rows}
    return {"anyOf": [row, rows], "description": "One row of numbers, or several."}
