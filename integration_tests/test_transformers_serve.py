"""`vlm-judge` before a real `transformers serve`: a tiny model made here, a process started and stopped here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit_tests" / "judge"))

from tiny_models import idefics3, idefics_processor, idefics_tokenizer

from velatura.api import Context, Prompt, Sample, Status
from velatura.core.judge import Judge, WeightedReward
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.reward import VlmJudge

for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed, reason="transformers serve needs it: pip install 'velatura[dev]'")

PATIENCE = 240
"""Seconds for a Python process with transformers to begin to listen on a busy machine."""


def reciting_model(folder: Path, text: str) -> Path:
    """A vision-language model of the real class that answers everything with `text`, whose characters all differ.

    Attention and MLP add nothing, so that a token's hidden state is its embedding; embeddings of the text are
    orthogonal, and the row of each token in the output layer is the embedding of the one before it.
    """
    torch.manual_seed(0)
    tokenizer = idefics_tokenizer()
    net = idefics3(tokenizer)
    chain = [tokenizer.encode(piece)[0] for piece in ("\n", *text)] + [tokenizer.eos_token_id]
    with torch.no_grad():
        for name, weight in net.model.text_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embedding, head = net.get_input_embeddings().weight, net.get_output_embeddings().weight
        assert embedding.data_ptr() != head.data_ptr()
        head.zero_()
        for place, token in enumerate(chain):
            embedding[token] = torch.eye(embedding.shape[1])[place]
        for place, token in enumerate(chain[1:]):
            head[token, place] = 10.0
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    net.save_pretrained(folder)
    idefics_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model of the server."""
    folder = tmp_path_factory.mktemp("served")
    model = reciting_model(folder / "model", "Score: [4]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture
def judge(server: tuple[str, str], tmp_path: Path) -> Callable[..., VlmJudge]:
    def make(**options: Any) -> VlmJudge:
        given = {"rubric": "alignment", "server": server[0], "model": server[1], "samples": 2, "retries": 0} | options
        made = VlmJudge(VlmJudgeOptions.model_validate(given))
        made.setup(Context(device=torch.device("cpu"), cache=tmp_path, seed=0, base=tmp_path))
        return made

    return make


def pictures(count: int) -> list[Sample]:
    prompt = Prompt(id="p", text="a grey wall", task="t2i")
    return [Sample(prompt=prompt, image=torch.full((3, 24, 24), i / 10), seed=i) for i in range(count)]


def test_pictures_are_scored_by_what_the_model_writes(judge: Callable[..., VlmJudge]) -> None:
    made = judge(reasoning_tokens=8)
    assert made._backend.has_logprobs is False  # type: ignore[attr-defined]
    reward = WeightedReward(label="alignment", at="here", model=made)
    with Judge([reward], max_failed=0.0, retries=0) as judging:
        judging.submit(pictures(3))
        report = judging.report([pictures(1)[0].prompt])
    assert report.valid.all()
    assert report.scores.flatten().tolist() == [4.0, 4.0, 4.0]
    assert all("Score: [4]" in note for note in report.notes[0])


def test_another_model_than_the_server_has_gives_no_score(judge: Callable[..., VlmJudge]) -> None:
    made = judge()
    wrong = VlmJudge(made.options.model_copy(update={"served_as": "another-model"}))
    wrong._backend = type(made._backend)(wrong.options, made.rubric)  # type: ignore[call-arg]
    scores = wrong.score(pictures(2))
    assert scores.status == (Status.FAILED, Status.FAILED)
    assert "answered for model" in scores.reasons[0]
