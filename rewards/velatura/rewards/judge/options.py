"""Options of `vlm-judge`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from velatura.api import Options
from velatura.rewards.judge.rubric import is_file_name, shipped_rubric
from velatura.rewards.transport import checked_address

SERVER_ONLY = (
    *("api_key_env", "concurrency", "timeout", "retries", "backoff", "deadline", "samples", "request", "served_as"),
)
OPERATIONAL = frozenset({
    "server", "api_key_env", "concurrency", "timeout", "retries", "backoff", "deadline", "served_as", "batch_size",
    "device",
})  # fmt: skip
"""Options that say where and how fast a judge runs, not what it says."""
LOCAL_ONLY = ("revision", "batch_size", "dtype", "device")


def require_fitting_place(options: Options, server: str | None, request: Mapping[str, Any]) -> None:
    """Options go with a server where there is one and with a model in this process where there is none. Those that have
    their default go with both: a run folder keeps all options, and they are read again.

    Raises:
        ValueError: some are for the other place, or `request` sets what is not its own.
    """
    fields = type(options).model_fields
    names = [name for name in (LOCAL_ONLY if server else SERVER_ONLY) if name in fields]
    foreign = [n for n in names if getattr(options, n) != fields[n].get_default(call_default_factory=True)]
    if foreign:
        place = "a model in this process, and `server` is given" if server else "a server, and none is given"
        raise ValueError(f"{', '.join(foreign)}: this is for {place}")
    reserved = {"model", "messages", "stream", "n"} & set(request)
    if reserved:
        raise ValueError(f"request must not set {', '.join(sorted(reserved))}")


class VlmJudgeOptions(Options):
    """What the judge reads, which model it is, and where that runs: in this process, or behind `server`."""

    rubric: str = Field(
        "",
        description="`alignment`, `aesthetics`, `portrait`, `edit-instruction`, `edit-quality`, or the path of one of "
        "your own, seen from the recipe. A judge that is given by `path` has its own.",
    )
    model: str = Field(
        "",
        description="Without `server` a model folder or a name on the hub; with it the name the server knows. A judge "
        "that is given by `path` is the model.",
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="A judge that a judge-fit stage made, in place of `rubric` and `model`: its folder, seen from the "
        "recipe.",
    )
    revision: str | None = Field(
        None, min_length=1, description="Of a model on the hub: branch, tag or commit; its kept scores go by it."
    )
    server: str | None = Field(
        None, description="Address of an OpenAI-compatible server, like `http://localhost:8000/v1`."
    )
    reasoning_tokens: int = Field(
        256, ge=0, le=32768, description="Most tokens of reasoning before the score; 0 asks for the score at once."
    )
    min_mass: float = Field(
        0.5, ge=0, lt=1, description="Least probability of all levels together; below it the score is a failure."
    )
    max_pixels: int | None = Field(
        None, ge=1024, description="Larger pictures are scaled down to this many pixels before the judge sees them."
    )
    api_key_env: str | None = Field(None, description="Environment variable that holds the server's key.")
    concurrency: int = Field(32, ge=1, description="Most pictures before the server at a time.")
    timeout: float = Field(60, gt=0, description="Seconds for one request.")
    retries: int = Field(3, ge=0, description="How often a request is repeated that the server did not answer well.")
    backoff: float = Field(
        0.5, ge=0, description="Seconds before the first repetition; doubled each time, less a random half at most."
    )
    deadline: float = Field(300, gt=0, description="Seconds for one picture with all its requests.")
    samples: int = Field(4, ge=1, description="Replies to average for a picture where the server gives no logprobs.")
    request: dict[str, Any] = Field(
        default_factory=dict, description="Fields added to each request; null takes one out."
    )
    served_as: str | None = Field(
        None, description="What the server's replies call the model, where it is not `model`."
    )
    batch_size: int = Field(8, ge=1, description="Pictures in one forward of a local model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of a local model; `auto` is that of its weights."
    )
    device: str | None = Field(None, description="Where a local model lives, like `cuda:1`; null is the run's device.")

    @field_validator("rubric")
    @classmethod
    def _is_known(cls, rubric: str) -> str:
        if rubric and not is_file_name(rubric):
            shipped_rubric(rubric)
        return rubric

    @field_validator("server")
    @classmethod
    def _is_address(cls, server: str | None) -> str | None:
        if server is None:
            return None
        return checked_address(server, "http://localhost:8000/v1").removesuffix("/chat/completions")

    @model_validator(mode="after")
    def _is_one_judge(self) -> Self:
        given = [name for name in ("rubric", "model", "revision", "server") if getattr(self, name)]
        if self.path is not None and given:
            raise ValueError(
                f"`path` is a judge with its own rubric and model, and {', '.join(given)} is given, too. To serve it, "
                f"name its rubric.yaml as `rubric`, and leave `path` out"
            )
        missing = [name for name in ("rubric", "model") if not getattr(self, name)]
        if self.path is None and missing:
            raise ValueError(f"{' and '.join(missing)} missing: give both, or the `path` of a fine-tuned judge")
        return self

    @model_validator(mode="after")
    def _suits_its_place(self) -> Self:
        require_fitting_place(self, self.server, self.request)
        return self
