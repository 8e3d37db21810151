"""mlx-vlm's own loops and programs run on streamed models, with the text of mlx-vlm alone."""

from __future__ import annotations

import base64
import gc
import importlib
import io
import json
import queue
import re
import subprocess
import sys
import threading
import urllib.request
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families as lm
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import vlm_families
from vlm_families import TEXT, make_vlm_checkpoint

from mlx_streamexperts import (
    BudgetError,
    StreamConfig,
    UnsupportedModelError,
    convert,
    doctor,
    generate,
    load,
    pack,
    patch,
    plan,
    read_trace,
    stream,
)
from mlx_streamexperts import run as run_command
from mlx_streamexperts._loading.discover import discover

vlm = pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: extra `vlm`")
utils = importlib.import_module("mlx_vlm.utils")

pytestmark = pytest.mark.usefixtures("not_compiled")

VLM = StreamConfig(progress=False, loader="mlx-vlm", prefetch="off")
QUESTION = "<|vision_start|><|image_pad|><|vision_end|>" * 2 + "What is to be seen on these? " * 4


@pytest.fixture
def both(seeing: Path) -> Iterator[Callable[..., tuple[Any, Any, Any]]]:
    """The stock model, a streamed one that misses, and their processor."""
    models: list[nn.Module] = []

    def make(**options: Any) -> tuple[Any, Any, Any]:
        stock, processor = vlm.load(str(seeing))
        options = {"cache": "400kB", **options}
        model, _ = load(str(seeing), config=StreamConfig(**{**vars(VLM), **options}))
        models.append(model)
        return stock, model, processor

    yield make
    for model in models:
        assert stream(model).stats().cache.misses > 0
        stream(model).close()
    models.clear()
    gc.collect()
    mx.clear_cache()


def generated(model: Any, processor: Any, prompt: str, **options: Any) -> list[Any]:
    """Token and log probabilities of each step."""
    found = vlm.stream_generate(model, processor, prompt, max_tokens=6, temperature=0.0, **options)
    return [(r.token, np.array(r.logprobs)) for r in found]


def assert_same(got: list[Any], expected: list[Any]) -> None:
    assert [token for token, _ in got] == [token for token, _ in expected]
    for (_, one), (_, other) in zip(got, expected, strict=True):
        assert np.array_equal(one, other)


def test_a_prompt_with_pictures_runs_in_planned_chunks(both: Any, pictures: list[str]) -> None:
    """mlx-vlm asks for steps of 2,048 tokens; the bits are those of its steps of 32."""
    stock, model, processor = both(prefill_tokens=32)
    expected = generated(stock, processor, QUESTION, image=pictures, prefill_step_size=32)
    stream(model).reset()
    assert_same(generated(model, processor, QUESTION, image=pictures), expected)
    layers = len(stream(model).layers)
    prompt = len(QUESTION.replace("<|image_pad|>", "").replace("<|vision_start|>", "v"))
    assert stream(model).stats().calls // layers >= 7 + prompt // 32


@pytest.mark.parametrize("options", [{"kv_bits": 4}, {"kv_bits": 3.5}], ids=["uniform", "turbo"])
def test_a_quantized_kv_cache_gives_the_same_bits(options: dict[str, Any], both: Any) -> None:
    stock, model, processor = both()
    options = {**options, "quantized_kv_start": 0, "kv_group_size": 32}
    expected = generated(stock, processor, QUESTION[-60:], **options)
    assert_same(generated(model, processor, QUESTION[-60:], **options), expected)


def test_a_batch_gives_the_text_of_mlx_vlms_batches(both: Any, pictures: list[str]) -> None:
    stock, model, processor = both()
    for options in ({}, {"images": pictures}):
        prompts = ["Hello there, how are you?", "Hi"]
        if options:
            prompts = [QUESTION[:43] + p for p in prompts]
        texts = [
            vlm.batch_generate(m, processor, prompts=prompts, max_tokens=6, **options).texts
            for m in (stock, model)
        ]
        assert texts[0] == texts[1]


def test_a_batch_of_unequal_prompts_runs_where_mlx_lms_would_be_refused(
    seeing: Path, tmp_path: Path
) -> None:
    """Sliding windows and windows of mlx-vlm's own classes."""
    folder = make_vlm_checkpoint(tmp_path / "m", "step3p7")
    stock, processor = utils.load_model(folder), vlm.load(str(seeing))[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(utils, "load_processor", lambda *_, **__: processor)
        model, _ = load(str(folder), cache="1MB", config=VLM)
    texts = []
    for m in (stock, model):
        m.config.eos_token_id = [0]
        prompts = ["Hello there, how are you?", "Hi"]
        texts.append(vlm.batch_generate(m, processor, prompts=prompts, max_tokens=6).texts)
    assert texts[0] == texts[1]
    assert stream(model).stats().cache.misses > 0


def test_a_film_gives_the_logits_of_mlx_vlm(both: Any) -> None:
    stock, model, _ = both()
    grid, frames = mx.array([[2, 4, 4]]), np.random.default_rng(0).standard_normal((32, 1176))
    film = {"pixel_values_videos": mx.array(frames.astype(np.float32)), "video_grid_thw": grid}
    ids = [vlm_families.VOCAB - 3, *[vlm_families.VOCAB - 2] * 4, vlm_families.VOCAB - 4] * 2
    tokens = np.concatenate([ids, lm.token_stream(TEXT, 12, 0)])
    expected = vlm_families.run(stock, tokens, 18, **film)
    blind = vlm_families.run(stock, tokens, 18)
    assert not np.array_equal(expected[0], blind[0])
    for one, other in zip(vlm_families.run(model, tokens, 18, **film), expected, strict=True):
        assert np.array_equal(one, other)


def test_a_film_comes_from_a_file_and_a_sound_needs_a_model_that_hears(
    seeing: Path, both: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2 = pytest.importorskip("cv2")  # mlx-vlm reads films with it
    stock, model, processor = both()
    film, sound = str(tmp_path / "film.mp4"), str(tmp_path / "sound.wav")
    writer = cv2.VideoWriter(film, cv2.VideoWriter_fourcc(*"mp4v"), 4, (84, 56))
    for frame in np.random.default_rng(0).integers(0, 255, (8, 56, 84, 3), dtype=np.uint8):
        writer.write(frame)
    writer.release()
    question = "<|vision_start|><|video_pad|><|vision_end|>What is it?"
    expected = generated(stock, processor, question, video=[film])
    assert_same(generated(model, processor, question, video=[film]), expected)
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(32000))
    options = ["--model", str(seeing), "--cache", "400kB", "--no-progress", "-p", "What?"]
    assert generate.main([*options, "--audio", sound]) == 1
    assert "does not support audio" in capsys.readouterr().err
    Path(sound).write_text("no sound")
    assert generate.main([*options, "--audio", sound]) == 1
    assert "error: mlx-vlm cannot answer this prompt" in capsys.readouterr().err


def test_a_sound_gives_the_logits_of_mlx_vlm(tmp_path: Path) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "qwen3_omni_moe")
    config = json.loads((folder / "config.json").read_text())
    config["thinker_config"]["audio_token_id"] = audio = vlm_families.VOCAB - 5
    (folder / "config.json").write_text(json.dumps(config))
    stock, model = utils.load_model(folder), load_model(folder, "1MB")
    features = mx.array(np.random.default_rng(0).standard_normal((1, 16, 40)).astype(np.float32))
    sound = {"input_features": features, "feature_attention_mask": mx.ones((1, 40), mx.int32)}
    tokens = np.concatenate([[audio] * 5, lm.token_stream(TEXT, 12, 0)])
    expected = vlm_families.run(stock, tokens, 11, **sound)
    assert not np.array_equal(expected[0], vlm_families.run(stock, tokens, 11)[0])
    for one, other in zip(vlm_families.run(model, tokens, 11, **sound), expected, strict=True):
        assert np.array_equal(one, other)
    assert stream(model).stats().cache.misses > 0


def load_model(folder: Path, cache: str, **options: Any) -> Any:
    """A model without processor."""
    with patch(cache=cache, config=StreamConfig(**{**vars(VLM), **options})):
        return utils.load_model(folder)


@pytest.mark.parametrize("options", [{"prefetch": "on"}, {"run_ahead": "on"}], ids=str)
def test_options_of_streaming_change_no_bit(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "step3p7")
    tokens = lm.token_stream(TEXT, 30, 0)
    stock, model = utils.load_model(folder), load_model(folder, "1MB", **options)
    with stream(model) as streamed:
        for one, other in zip(
            vlm_families.run(model, tokens, 12), vlm_families.run(stock, tokens, 12), strict=True
        ):
            assert np.array_equal(one, other)
        stats = streamed.stats()
        assert stats.cache.misses > 0
        assert (stats.prefetch.issued > 0) == ("prefetch" in options)
        assert stats.run_ahead.steps == 0
        assert ("run_ahead does not work with mlx-vlm" in caplog.text) == ("run_ahead" in options)


def test_stores_hot_sets_and_traces_work(tmp_path: Path) -> None:
    folder, store, hot = (
        make_vlm_checkpoint(tmp_path / "m", "step3p7"),
        tmp_path / "s",
        tmp_path / "h",
    )
    assert pack.main(["--model", str(folder), "--out", str(store), "--no-progress"]) == 0
    tokens = lm.token_stream(TEXT, 30, 0)
    expected = vlm_families.run(utils.load_model(folder), tokens, 12)
    first = load_model(folder, "1MB")
    with stream(first) as streamed, streamed.trace(tmp_path / "t"):
        vlm_families.run(first, tokens, 12)
        streamed.save_hot_set(hot)
    assert [len(calls) for calls in read_trace(tmp_path / "t").layers] == [19, 19]
    second = load_model(folder, "1MB", store=str(store), verify_reads=True, hot_set=str(hot))
    with stream(second) as streamed:
        for one, other in zip(vlm_families.run(second, tokens, 12), expected, strict=True):
            assert np.array_equal(one, other)
        assert streamed.stats().cache.misses > 0


def test_doctor_judges_a_model_of_mlx_vlm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "step3p7")
    options = ["--memory", "60GB", "--json"]
    assert doctor.main(["--model", str(folder), "--machine", "M4 Max 128 GB", *options]) == 0
    (machine,) = json.loads(capsys.readouterr().out)["machines"]
    assert doctor.main(["--model", str(folder), "--machine", "M4 Max 128 GB", *options[:2]]) == 0
    said = capsys.readouterr().out  # our own chat refuses it
    assert f"  Type: streamexperts run --memory 60GB mlx_vlm.chat --model {folder}\n" in said
    assert machine["plan"]["model_type"] == "step3p7"
    assert machine["prediction"]["tokens_per_s"]["low"] > 0


def test_convert_and_writing_a_model_are_refused(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_vlm_checkpoint(tmp_path / "m", "step3p7")
    assert convert.main(["--model", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "convert works with models of mlx-lm only" in capsys.readouterr().err
    for program in (["mlx_vlm.convert"], ["mlx_vlm", "convert"]):
        assert run_command.main([*program, "--hf-path", str(folder)]) == 1
        assert "mlx_vlm.convert does not run on a streamed model" in capsys.readouterr().err
    with (
        patch(cache="1MB", config=VLM),
        pytest.raises(UnsupportedModelError, match="would not be saved"),
    ):
        utils.save_weights(tmp_path / "out", utils.load_model(folder))


def test_mlx_vlms_chat_runs(
    seeing: Path,
    pictures: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    said, talk = [], f"Hello\n/image {pictures[0]}\nWhat is it?\n/exit\n"
    options = ["--model", str(seeing), "--max-tokens", "6", "--temperature", "0", "--verbose"]
    trace = tmp_path / "trace"
    ours = ["--cache", "400kB", "--no-progress", "--trace", str(trace), "mlx_vlm.chat", *options]
    monkeypatch.setattr(sys, "stdin", io.StringIO(talk))
    assert run_command.main(ours) == 0
    out, err = capsys.readouterr()
    said.append(out)
    assert "misses after eviction" in err
    assert all(len(calls) > 0 for calls in read_trace(trace).layers)
    monkeypatch.setattr(sys, "stdin", io.StringIO(talk))
    monkeypatch.setattr(sys, "argv", ["chat", *options])
    importlib.import_module("mlx_vlm.chat").main()
    said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].count("Assistant:") == 2


def test_mlx_vlms_server_answers(seeing: Path, pictures: list[str]) -> None:
    command = [sys.executable, "-m", "mlx_streamexperts.run", "--cache", "400kB", "mlx_vlm.server"]
    options = ["--model", str(seeing), "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout is not None
    output, said, ports = server.stdout, list[str](), queue.SimpleQueue[int]()

    def listen() -> None:
        """Read all it says: a full pipe would stop it."""
        for line in output:
            said.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                ports.put(int(found[1]))
        ports.put(0)  # it has ended

    listener = threading.Thread(target=listen)
    listener.start()

    def ask(content: Any) -> str:
        body = {"model": str(seeing), "max_tokens": 6, "temperature": 0}
        body["messages"] = [{"role": "user", "content": content}]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return str(json.loads(reply.read())["choices"][0]["message"]["content"])

    try:
        port = ports.get(timeout=60)
        assert port, "".join(said)
        stock, processor = vlm.load(str(seeing))
        assert ask("Hello") == vlm.generate(stock, processor, "Hello", max_tokens=6).text
        data = base64.b64encode(Path(pictures[0]).read_bytes()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        assert ask([picture, {"type": "text", "text": "What?"}])
    finally:
        server.send_signal(2)
        try:
            server.wait(60)
        finally:
            server.kill()
            listener.join(60)
            output.close()
    assert "misses after eviction" in "".join(said)


SEEING = [
    "gemma4", "glm5_next", "kimi_k25", "llama4", "minimax_m3_vl", "qwen4_exp",
    "step3p7",
]  # fmt: skip


@pytest.mark.parametrize("family", SEEING)
def test_pictures_give_the_logits_of_mlx_vlm(family: str, tmp_path: Path) -> None:
    """One picture and two, with misses."""
    folder = make_vlm_checkpoint(tmp_path / "m", family)
    layers = discover(folder, VLM, {}).layers
    stock = utils.load_model(folder)
    model = load_model(folder, str(sum(4 * x.expert_bytes for x in layers)))
    words = lm.token_stream(TEXT, 20, 0)
    for count in (1, 2):
        found = [vlm_families.picture(family, seed) or ([], {}) for seed in range(count)]
        ids = [i for places, _ in found for i in [*places, 5]]
        given = {n: mx.concatenate([g[n] for _, g in found]) for n in found[0][1]}
        tokens, prompt = np.concatenate([ids, words]), len(ids) + 12
        expected = vlm_families.run(stock, tokens, prompt, **given)
        assert not np.array_equal(expected[0], vlm_families.run(stock, tokens, prompt)[0])
        got = vlm_families.run(model, tokens, prompt, **given)
        for one, other in zip(got, expected, strict=True):
            assert np.array_equal(one, other)
    with stream(model) as streamed:
        assert streamed.stats().cache.misses > 0


def test_a_large_picture_gets_room_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its tower takes is not in the plan: 1,024 patches have 8 MB of attention scores."""
    gc.collect()
    mx.clear_cache()
    family, side = "qwen3_vl_moe", 32
    monkeypatch.setitem(vlm_families.FAMILIES[family].config["vision_config"], "depth", 3)
    folder = make_vlm_checkpoint(tmp_path / "m", family, bits=4)
    places, given = vlm_families.picture(family) or ([], {})
    count = side * side // given["pixel_values"].shape[0]
    given["pixel_values"] = mx.concatenate([given["pixel_values"]] * count)
    given["image_grid_thw"] = mx.array([[1, side, side]])
    pad = max(places, key=places.count)
    ids = np.repeat(places, [count if i == pad else 1 for i in places])[None]
    pixels = given.pop("pixel_values")
    mx.eval(pixels)

    def seen(model: Any) -> np.ndarray:
        found = model.get_input_embeddings(mx.array(ids), pixels, mask=None, **given)
        return np.array(found.inputs_embeds)

    config = StreamConfig(**{**vars(VLM), "context_tokens": 300})
    with pytest.raises(BudgetError) as least:
        plan(folder, "1MB", config=config)
    with patch(least.value.needed_bytes, config=config):
        model = utils.load_model(folder)
    with stream(model), pytest.raises(BudgetError, match="this prompt's pictures or sound") as more:
        seen(model)
    budget = more.value.needed_bytes  # the smallest that works, as the message says
    del model, least, more  # their tracebacks hold the model
    gc.collect()
    mx.clear_cache()
    with patch(budget, config=config):
        model = utils.load_model(folder)
    with stream(model) as streamed:
        mx.reset_peak_memory()
        got = seen(model)
        assert mx.get_peak_memory() <= budget + streamed.plan.others
    assert np.array_equal(got, seen(utils.load_model(folder)))


def test_a_prompt_with_pictures_stays_within_its_plan(
    seeing: Path, pictures: list[str], tmp_path: Path
) -> None:
    gc.collect()
    mx.clear_cache()
    with pytest.raises(BudgetError) as least:
        plan(seeing, "1MB", config=StreamConfig(**{**vars(VLM), "context_tokens": 800}))
    budget = least.value.needed_bytes + (1 << 16)
    config = StreamConfig(**{**vars(VLM), "context_tokens": 800, "memory": budget})
    model, processor = load(str(seeing), config=config)
    with stream(model) as streamed:
        mx.reset_peak_memory()
        question = QUESTION[:86] + "What is to be seen on these? " * 24
        generated(model, processor, question, image=pictures)
        assert streamed.stats().calls // len(streamed.layers) > 10  # several chunks
        assert mx.get_peak_memory() <= budget + streamed.plan.others
