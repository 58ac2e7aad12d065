"""What is wrong with a checkpoint, found before anything is written and told at once.

Names and shapes of all tensors follow from the config by the table of architectures. Whether
values are numbers shows when they are read: :class:`edgekd.export.checkpoint.Checkpoint` looks.
"""

from collections.abc import Iterator

from edgekd.errors import ModelError
from edgekd.export.architectures import ties_embedding
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.probe_chats import chat_template_fault
from edgekd.units import format_some

Shapes = dict[str, tuple[int, ...]]
_NEEDED = ("intermediate_size", "max_position_embeddings", "rms_norm_eps")


def check_input(checkpoint: Checkpoint) -> None:
    """Refuse what no export could be right about.

    Raises:
        ExportError: the architecture is unknown, or has an option that would be translated wrongly.
        ModelError: a tensor is missing, has another shape than the config says or is none of this
            architecture's, or the chat template renders no conversation.
    """
    family = checkpoint.architecture.hf_names[0]
    if lacking := [key for key in _NEEDED if not checkpoint.config.get(key)]:
        raise ModelError(f"{checkpoint.folder}: config.json lacks {format_some(lacking)}")
    faults = list(_tensor_faults(checkpoint, family))
    if faults and (values := checkpoint.faulty_values()):
        faults.append(values)  # they would only be seen while writing
    if fault := chat_template_fault(checkpoint.folder):
        faults.append(fault)
    if faults:
        raise ModelError(
            f"{checkpoint.folder} cannot be exported: {'; '.join(faults)}; fetch it again, or mend "
            "it"
        )


def expected_shapes(checkpoint: Checkpoint) -> Shapes:
    """Return name and shape of every tensor that the config promises."""
    config = checkpoint.config
    table = (int(config["vocab_size"]), int(config["hidden_size"]))
    shapes: Shapes = {"model.embed_tokens.weight": table, "model.norm.weight": table[1:]}
    if not ties_embedding(config):
        shapes["lm_head.weight"] = table
    in_layer = _layer_shapes(checkpoint)
    for layer in range(checkpoint.n_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    return shapes


def _tensor_faults(checkpoint: Checkpoint, family: str) -> Iterator[str]:
    expected, stored = expected_shapes(checkpoint), checkpoint.shard_of
    if missing := [name for name in expected if name not in stored]:
        yield f"tensors are missing: {format_some(missing)}"
    shapes = {name: checkpoint.shape(name) for name in expected if name in stored}
    wrong = [
        f"{name} is {list(shape)}, by config.json {list(expected[name])}"
        for name, shape in shapes.items()
        if shape != expected[name]
    ]
    if wrong:
        yield f"shapes are wrong: {format_some(wrong)}"
    if unknown := [name for name in stored if name not in expected]:
        yield f"no {family} with this config.json has {format_some(unknown)}"


def _layer_shapes(checkpoint: Checkpoint) -> Shapes:
    """Return name, after ``model.layers.N.``, and shape of every tensor of a layer."""
    architecture, matrices = checkpoint.architecture, _matrix_shapes(checkpoint)
    shapes: Shapes = {}
    for name in architecture.layer_names:
        is_per_head = name.endswith(("q_norm", "k_norm"))
        norm = checkpoint.head_dim if is_per_head else int(checkpoint.config["hidden_size"])
        shapes[f"{name}.weight"] = matrices.get(name, (norm,))
    for option, names in architecture.biases.items():
        if checkpoint.config.get(option):
            shapes |= {f"{name}.bias": matrices[name][:1] for name in names}
    return shapes | {f"{name}.bias": matrices[name][:1] for name in architecture.fixed_biases}


def _matrix_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    hidden, inner = (int(checkpoint.config[f"{side}_size"]) for side in ("hidden", "intermediate"))
    queries = int(checkpoint.config["num_attention_heads"]) * checkpoint.head_dim
    keys = checkpoint.n_kv_heads * checkpoint.head_dim
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.qkv_proj": (queries + 2 * keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.gate_up_proj": (2 * inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
