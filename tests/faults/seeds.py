"""The small valid inputs that fuzzing starts from, written into tests/faults/corpus.

python -m tests.faults.seeds
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.conftest import TEXTS, save_tiny_model

CORPUS = Path(__file__).with_name("corpus")
_ROUTES_TO_SEED = 7


def save_small_model(folder: Path) -> Path:
    """Write a Llama of one layer as GGUF into ``folder`` and return where."""
    from edgekd.export.export_model import export_model

    checkpoint = save_tiny_model(folder / "checkpoint", n_layers=1, pad_token_id=None)
    export_model(str(checkpoint), "gguf", folder / "small.gguf", quant="q8_0")
    return folder / "small.gguf"


def gguf_seed(folder: Path) -> bytes:
    """Return a GGUF file of a Llama with sixteen tokens and a tensor of each kind of place."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType

    path = folder / "seed.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<s>", "</s>", *"abcdefghij", "ab", "cd", "abcd", "Ġ"]
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "c d", "ab cd"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    blocks = np.zeros((2, 18), np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.ffn_up.weight", blocks[:1], raw_dtype=GGMLQuantizationType.Q4_0)
    writer.add_tensor("output_norm.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def onnx_seed() -> bytes:
    """Return a graph with an embedding, an int4 matrix, a float matrix and a cache."""
    from onnx import TensorProto, helper

    stored = [
        helper.make_tensor("table", TensorProto.FLOAT, [2, 2], [0.0] * 4),
        helper.make_tensor("codes", TensorProto.UINT8, [2, 1, 2], [0] * 4),
        helper.make_tensor("scales", TensorProto.FLOAT, [2], [0.0] * 2),
        helper.make_tensor("matrix", TensorProto.FLOAT16, [2, 2], [0.0] * 4),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], K=2, N=2, bits=4),
        helper.make_node("Transpose", ["matrix"], ["turned"]),
        helper.make_node("MatMul", ["y", "turned"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["b"]),
        helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT16, ["b", 2]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 2])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializer=stored)
    return bytes(helper.make_model(graph).SerializeToString())


def onnx_files_seed() -> bytes:
    """Return a graph that names files: for weights, in a body of a branch too, and for a binary."""
    from onnx import TensorProto, helper

    weights = [TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4]) for name in "ab"]
    for number, tensor in enumerate(weights):
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", 16 * number), ("length", 16)):
            tensor.external_data.add(key=key, value=str(value))
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("values", TensorProto.FLOAT, [1], [1]),
        helper.make_tensor("places", TensorProto.INT64, [1], [3]),
        [4],
    )
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    body = helper.make_graph([], "body", [], [result], initializer=weights[1:])
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
        helper.make_node("EPContext", ["y"], ["z"], embed_mode=0, ep_cache_context="weights.bin"),
    ]
    graph = helper.make_graph(
        nodes, "g", [], [result], initializer=weights[:1], sparse_initializer=[sparse]
    )
    return bytes(helper.make_model(graph).SerializeToString())


def manifest_seed() -> bytes:
    """Return a manifest of a folder with one file."""
    from edgekd.manifest import Manifest, manifest_text

    entry = {"sha256": "9ab4ed2e1e1c5b6d5a1b1a1b0a6f", "bytes": 7}
    source = {"role": "teacher", "name": "result", "weights_sha256": "0" * 8}
    manifest = Manifest(
        kind="artifact", files={"model.safetensors": entry}, made_from=[source], licence="MIT"
    )
    return manifest_text(manifest).encode()


def recipe_seed(folder: Path) -> bytes:
    """Return a recipe with every setting."""
    from edgekd.distill.recipe import Job, Recipe, write_recipe

    write_recipe(folder / "r.toml", Job(student="s", data=["d"], teacher="t", recipe=Recipe()))
    return (folder / "r.toml").read_bytes()


def cache_seeds(folder: Path) -> dict[str, bytes]:
    """Return the files of a small cache; the first byte says which one the target varies."""
    from edgekd.distill.cache import CaptureSettings, capture

    teacher = save_tiny_model(folder / "teacher", n_layers=1)
    text = folder / "text.txt"
    text.write_text(TEXTS[0])
    settings = CaptureSettings(row_tokens=12, top_k=6, tail_samples=2)
    capture(str(teacher), [str(text)], folder / "cache", settings)
    index = json.loads((folder / "cache" / "cache.json").read_text())
    index["identity"]["teacher"] = "teacher"
    return {
        "index.json": json.dumps(index).encode(),
        "index": b"{" + json.dumps(index).encode(),
        "shard": b"s" + (folder / "cache" / "shard-00000.safetensors").read_bytes(),
    }


def http_seeds() -> dict[str, bytes]:
    """Return a request with no further field of each route, and a raw body."""
    seeds = {f"route-{number}": bytes([number, 1]) for number in range(_ROUTES_TO_SEED)}
    return seeds | {"raw": b'\x00\x00{"messages": [{"role": "user", "content": "a"}]}'}


def main() -> None:
    """Write them all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = {
            "gguf": {"seed": gguf_seed(folder)},
            "onnx": {"seed": onnx_seed(), "seed-files": onnx_files_seed()},
            "manifest": {"seed": manifest_seed()},
            "recipe": {"seed": recipe_seed(folder)},
            "cache": cache_seeds(folder),
            "http": http_seeds(),
        }
    for target, files in seeds.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for file_name, content in files.items():
            (CORPUS / target / file_name).write_bytes(content)


if __name__ == "__main__":
    main()
