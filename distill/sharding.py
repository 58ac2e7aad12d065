"""What FSDP2 takes when a student is spread over several GPUs: memory and network.

Every GPU keeps its share of weights, gradients and optimizer. For each forward and each backward
it gathers the weights of one layer after the other, and afterwards it receives its share of the
summed gradients. Weights travel as they are stored: the masters are float32.
"""

import math
from dataclasses import dataclass

from edgekd.distill.machines import Machine
from edgekd.export.checkpoint import Checkpoint

_LAYERS_AT_ONCE = 2  # the one that computes, and the next one on its way


@dataclass(frozen=True)
class Traffic:
    """What the network carries for one optimizer step."""

    gpu_bytes: float
    """What each GPU receives."""
    node_bytes: float
    """What each node receives from the others."""
    seconds: float
    """The least time that takes: both at the rates of the data sheets."""


def gathered_bytes(student: Checkpoint, weight_bytes: float, *, with_gradients: bool) -> float:
    """Return what is whole on every GPU at a time, at ``weight_bytes`` a weight.

    That is two layers and, all the time, what lies outside of layers; with ``with_gradients``
    their gradients before they are summed, too.
    """
    sizes = {
        name: math.prod(student.shape(name)) for name in student.shard_of if ".layers." in name
    }
    outside = student.n_parameters - sum(sizes.values())
    layer = sum(sizes.values()) / student.n_layers
    whole = (outside + _LAYERS_AT_ONCE * layer) * weight_bytes
    return whole * (2 if with_gradients else 1)


def traffic_of_step(
    machine: Machine, weights_bytes: float, gradients_bytes: float, n_passes: int
) -> Traffic:
    """Return what ``n_passes`` forward and backward passes move before a step is taken.

    All-gather and reduce-scatter bring each of N members (N - 1) / N of what is moved; rings go
    through links and network at the same time, so the slower of the two decides.
    """
    moved = 2 * n_passes * weights_bytes + gradients_bytes
    n_gpus, n_nodes = machine.n_devices, machine.n_nodes
    gpu_bytes = moved * (n_gpus - 1) / n_gpus
    node_bytes = moved * (n_nodes - 1) / n_nodes
    seconds = max(gpu_bytes / machine.link_bytes_per_s, node_bytes / machine.node_bytes_per_s)
    return Traffic(gpu_bytes, node_bytes, seconds)
