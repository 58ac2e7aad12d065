"""llama-server's routes, against what its README says of them."""

import json
from collections.abc import Iterator

import httpx
import pytest
from safetensors.torch import load_file

from edgekd.export.checkpoint import Checkpoint
from tests.runtime.serving import Json, Serving, refused, serving

ASKED: Json = {
    "prompt": "The quick brown",
    "n_predict": 12,
    "temperature": 0,
    "ignore_eos": True,
    "cache_prompt": False,
}


@pytest.fixture(scope="module", params=["float_gguf", "float_onnx"])
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(request.getfixturevalue(request.param)) as found:
        yield found


def native_events(response: httpx.Response) -> list[Json]:
    lines = [line for line in response.iter_lines() if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("route", ["/completion", "/completions", "/v1/completion"])
def test_a_completion_has_llama_servers_fields(server: Serving, route: str) -> None:
    found = server.post(route, ASKED | {"return_tokens": True, "seed": 7}).json()
    assert (
        len(found["tokens"]) == found["tokens_predicted"] == found["timings"]["predicted_n"] == 12
    )
    pieces = server.post("/detokenize", {"tokens": found["tokens"]}).json()["content"]
    assert pieces == found["content"]
    assert (found["stop"], found["stop_type"], found["stopping_word"]) == (True, "limit", "")
    assert found["tokens_cached"] == 0 and found["timings"]["prompt_n"] == found["tokens_evaluated"]
    assert found["prompt"] == "The quick brown" and found["model"] == "tiny"
    assert found["timings"]["predicted_per_second"] > 0 and not found["truncated"]
    settings = found["generation_settings"]
    assert (settings["n_predict"], settings["seed"], settings["n_ctx"]) == (12, 7, 256)
    assert 0 <= found["id_slot"] < 3 and found["index"] == 0


def test_a_stream_gives_the_same_text_and_ends_with_every_field(server: Serving) -> None:
    whole = server.post("/completion", ASKED).json()
    *parts, last = native_events(server.post("/completion", ASKED | {"stream": True}))
    assert "".join(part["content"] for part in [*parts, last]) == whole["content"]
    assert all(part["stop"] is False and len(part["tokens"]) == 1 for part in parts)
    assert last.keys() == whole.keys() and last["tokens_predicted"] == 12


def test_a_stopping_word_is_named(server: Serving) -> None:
    text = server.post("/completion", ASKED).json()["content"]
    found = server.post("/completion", ASKED | {"stop": ["never", text[4:8]]}).json()
    assert (found["stop_type"], found["stopping_word"]) == ("word", text[4:8])
    assert found["content"] == text[: text.find(text[4:8])]


def test_a_prompt_seen_before_is_taken_from_the_cache(server: Serving) -> None:
    asked = ASKED | {"cache_prompt": True, "id_slot": 1, "prompt": "jumps over the lazy dog"}
    first, second = (server.post("/completion", asked).json() for _ in range(2))
    n_prompt = first["tokens_evaluated"]
    assert second["tokens_cached"] == second["timings"]["cache_n"] == n_prompt - 1
    assert second["timings"]["prompt_n"] == 1 and second["id_slot"] == 1
    assert second["content"] == first["content"]


def test_probabilities_come_with_their_alternatives(server: Serving) -> None:
    found = server.post("/completion", ASKED | {"n_probs": 4}).json()
    assert len(found["completion_probabilities"]) == 12
    for token in found["completion_probabilities"]:
        best = token["top_logprobs"]
        assert len(best) == 4 and best[0]["id"] == token["id"]  # greedy
        assert best[0]["logprob"] == token["logprob"] >= best[1]["logprob"]
    pieces = b"".join(bytes(token["bytes"]) for token in found["completion_probabilities"])
    assert pieces.decode("utf-8", "replace") == found["content"]


def test_probabilities_behind_the_samplers_are_asked_for(server: Serving) -> None:
    asked = {"n_probs": 4, "temperature": 1, "top_k": 3, "seed": 3, "post_sampling_probs": True}
    found = server.post("/completion", ASKED | asked).json()
    assert found["generation_settings"]["post_sampling_probs"] is True
    for token in found["completion_probabilities"]:
        best = token["top_probs"]
        assert len(best) == 3 and "logprob" not in token and "top_logprobs" not in token
        assert sum(each["prob"] for each in best) == pytest.approx(1)
        assert token["prob"] in [each["prob"] for each in best if each["id"] == token["id"]]
    refused = server.post("/v1/completions", {"prompt": "a", "post_sampling_probs": True})
    assert refused.status_code == 400 and "post_sampling_probs" in refused.text


def test_several_prompts_and_completions_come_as_an_array(server: Serving) -> None:
    ids = server.post("/tokenize", {"content": "The quick brown"}).json()["tokens"]
    mixed = [*ids[:1], *ids[1:]]
    found = server.post("/completion", ASKED | {"prompt": ["The quick brown", mixed, "def"]}).json()
    assert [each["index"] for each in found] == [0, 1, 2]
    assert found[0]["content"] == found[1]["content"] != found[2]["content"]
    twice = server.post("/completion", ASKED | {"n_cmpl": 2, "temperature": 1, "seed": 5}).json()
    assert len(twice) == 2 and twice[0]["content"] != twice[1]["content"]
    pieces = ["The quick", *ids[2:]]
    one = server.post("/completion", ASKED | {"prompt": pieces}).json()
    assert one["prompt"].startswith("The quick")


def test_response_fields_choose_and_unnest(server: Serving) -> None:
    fields = ["content", "generation_settings/n_predict", "nothing/at/all"]
    found = server.post("/completion", ASKED | {"response_fields": fields}).json()
    assert found.keys() == {"content", "n_predict"} and found["n_predict"] == 12


def test_nothing_predicted_still_fills_the_cache(server: Serving) -> None:
    asked = ASKED | {"n_predict": 0, "cache_prompt": True, "id_slot": 2, "prompt": "boxes of wool"}
    found = server.post("/completion", asked).json()
    assert (found["content"], found["tokens_predicted"]) == ("", 0)
    assert server.post("/completion", asked).json()["tokens_cached"] > 0


def test_grammar_schema_and_bias_shape_the_text(server: Serving) -> None:
    grammar = {"grammar": 'root ::= "a" [bc] "d"'}
    assert server.post("/completion", ASKED | grammar).json()["content"] in ("abd", "acd")
    schema = {"json_schema": {"enum": ["x1", "x2"]}}
    assert json.loads(server.post("/completion", ASKED | schema).json()["content"]) in ("x1", "x2")
    first = server.post("/completion", ASKED | {"return_tokens": True}).json()["tokens"][0]
    for bias in ([[first, False]], {str(first): -100}):
        asked = ASKED | {"logit_bias": bias, "return_tokens": True}
        assert first not in server.post("/completion", asked).json()["tokens"]
    forced = server.post("/tokenize", {"content": " fox"}).json()["tokens"]
    found = server.post("/completion", ASKED | {"logit_bias": [[" fox", 100]], "n_predict": 1})
    if len(forced) == 1:
        assert found.json()["content"] == " fox"


@pytest.mark.parametrize(
    "field",
    [
        {"mirostat": 2},
        {"samplers": ["top_k", "infill"]},
        {"samplers": "kz"},
        {"samplers": ["top_k", "penalties"], "repeat_penalty": 1.1},
        {"dry_multiplier": 0.5, "samplers": ["dry"]},
        {"n_predict": -2},
        {"id_slot": 99},
        {"n_probs": 10**9},
        {"grammar": "root ::= [a]", "json_schema": {}},
        {"grammar": "(" * 30000},
        {"logit_bias": [[10**6, 1]]},
        {"prompt": [10**6, "x"]},
        {"prompt": []},
        {"prompt": {"prompt_string": "x", "multimodal_data": ["aGk="]}},
    ],
)
def test_what_cannot_be_done_is_refused(server: Serving, field: Json) -> None:
    response = server.post("/completion", ASKED | field)
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_text_becomes_tokens_and_text_again(server: Serving, prefix: str) -> None:
    text = "Grüße, 日本語 <|im_end|>"
    plain = {"content": text, "parse_special": False}
    ids = server.post(prefix + "/tokenize", plain).json()["tokens"]
    assert server.post(prefix + "/detokenize", {"tokens": ids}).json() == {"content": text}
    special = server.post(prefix + "/tokenize", {"content": text}).json()["tokens"]
    assert special[-1] == 2 and 2 not in ids and len(special) < len(ids)
    pieces = server.post(prefix + "/tokenize", plain | {"with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    assert any(isinstance(piece["piece"], list) for piece in pieces)  # a part of a character
    refused(server.post(prefix + "/detokenize", {"tokens": [10**6]}), 400, "invalid_value")


def test_the_chat_template_can_be_applied_alone(server: Serving) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    prompt = server.post("/apply-template", asked).json()["prompt"]
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_properties_and_slots_tell_how_it_is_set_up(server: Serving) -> None:
    props = server.get("/props").json()
    assert props["total_slots"] == 3 and props["default_generation_settings"]["n_ctx"] == 256
    assert props["default_generation_settings"]["params"]["temperature"] == 0.8
    assert "im_start" in props["chat_template"] and "/" not in props["model_path"]
    assert (props["bos_token"], props["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    slots = server.get("/v1/slots").json()
    assert [(slot["id"], slot["n_ctx"], slot["is_processing"]) for slot in slots] == [
        (number, 256, False) for number in range(3)
    ]
    assert server.get("/slots?fail_on_no_slot=1").status_code == 200


def test_a_busy_slot_shows_its_settings_and_how_far_its_text_is(server: Serving) -> None:
    asked = {"prompt": "The", "n_predict": 200, "ignore_eos": True, "stream": True, "id_slot": 1}
    asked |= {"temperature": 0.5, "samplers": ["temperature"]}
    with httpx.stream("POST", server.url + "/completion", json=asked, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(3):
            next(lines)
        slots = server.get("/slots").json()
        idle, busy = slots[0], slots[1]
    assert busy["is_processing"] and busy["id_task"] >= 0 and not idle["is_processing"]
    assert (busy["params"]["temperature"], idle["params"]["temperature"]) == (0.5, 0.8)
    assert busy["params"]["samplers"] == ["temperature"] and busy["params"]["n_predict"] == 200
    told = busy["next_token"]
    assert told["has_next_token"] and told["n_decoded"] >= 2
    assert told["n_remain"] == 200 - told["n_decoded"]
    assert idle["next_token"] == {
        "has_next_token": False,
        "has_new_line": False,
        "n_remain": -1,
        "n_decoded": 0,
    }


README_SETTINGS = {
    *("n_predict", "seed", "temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p"),
    *("min_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "typical_p", "repeat_last_n"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base"),
    *("dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "mirostat"),
    *("mirostat_tau", "mirostat_eta", "stop", "max_tokens", "n_keep", "n_discard", "ignore_eos"),
    *("stream", "n_probs", "min_keep", "grammar", "samplers", "speculative.n_max"),
    *("speculative.n_min", "speculative.p_min", "timings_per_token", "post_sampling_probs", "lora"),
}
"""Of the examples of /props and /slots, but for those of llama-server's own chat parser."""


def test_every_setting_of_the_readme_is_shown_and_can_be_sent_back(server: Serving) -> None:
    defaults = server.get("/props").json()["default_generation_settings"]
    answered = server.post("/completion", ASKED).json()["generation_settings"]
    for found in (defaults["params"], answered, server.get("/slots").json()[0]["params"]):
        assert README_SETTINGS - found.keys() == set()
    assert (defaults["prompt"], defaults["next_token"]["has_next_token"]) == ("", True)
    sent = {name: defaults["params"][name] for name in README_SETTINGS}
    again = server.post("/completion", ASKED | sent | {"n_predict": 3}).json()
    shown = again["generation_settings"]
    changed = {name for name in README_SETTINGS if shown[name] != sent[name]}
    assert changed == {"n_predict", "max_tokens"} and again["tokens_predicted"] == 3


def test_the_list_of_models_tells_sizes(server: Serving, tiny: Checkpoint) -> None:
    (model,) = server.get("/v1/models").json()["data"]
    meta, config = model["meta"], tiny.config
    assert (meta["vocab_type"], meta["n_ctx"]) == (2, 256)
    assert meta["n_embd"] == config["hidden_size"] and meta["n_vocab"] == config["vocab_size"]
    assert meta["n_ctx_train"] == config["max_position_embeddings"]
    tensors = [load_file(shard) for shard in set(tiny.shard_of.values())]
    n_params = sum(tensor.numel() for shard in tensors for tensor in shard.values())
    is_gguf = server.get("/props").json()["model_path"].endswith(".gguf")
    assert meta["n_params"] == (n_params if is_gguf else None)  # a graph's matrices are packed
    assert meta["size"] >= 4 * n_params
    assert model["architecture"]["input_modalities"] == ["text"]


@pytest.mark.parametrize(
    ("route", "status"),
    [
        *((route, 404) for route in ("/infill", "/rerank", "/v1/reranking", "/embedding")),
        *((route, 404) for route in ("/v1/responses", "/v1/messages", "/slots/0?action=save")),
        *((route, 404) for route in ("/v1/chat/completions/control", "/tools")),
        *((route, 405) for route in ("/props", "/slots")),
        ("/lora-adapters", 404),
    ],
)
def test_routes_of_llama_server_that_the_docs_call_absent_are(
    server: Serving, route: str, status: int
) -> None:
    response = server.post(route, {})
    assert response.status_code == status and response.json()["error"]["message"]


def test_metrics_count_what_was_done(server: Serving) -> None:
    def read() -> dict[str, float]:
        lines = server.get("/metrics").text.splitlines()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        }

    before = read()
    server.post("/completion", ASKED)
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('edgekd_requests_total{outcome="limit"}') == 1
    assert grown("edgekd_generated_tokens_total") == 12
    assert grown("llamacpp:tokens_predicted_total") == 12
    assert grown("edgekd_time_to_first_token_seconds_count") == 1
    assert grown("edgekd_inter_token_seconds_count") == 11
    assert after["llamacpp:requests_processing"] == 0 and after["edgekd_ready"] == 1
    assert 0 < after["llamacpp:kv_cache_usage_ratio"] <= 1
