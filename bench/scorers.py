"""Per-prompt policy gradients, projected, by four other libraries: bench/scorers.py holds the ways of bench/peers.py.

Each function makes ready once and returns a callable that scores all groups once: (N, D) float32, D as near to k as the
library allows. A group holds the K sequences of a prompt, padded on the right: ids, completion, behavior_logps and
weight, each (K, W). The gradient of a prompt is that of Σ weight · ρ · log π_θ over the completion tokens of all K, ρ
being a constant. `batch` is the number of prompts at a time. The model is copied, and must have no hooks yet.

                 what is projected                               how
    dattri_llm   linear layers, with biases                      hooks; both sides of a layer to p dimensions (LoGra)
    bergson      linear layers, with biases                      hooks; both sides of a layer to p dimensions
    dattri       everything, norms and embeddings included       vmap of torch.func.grad; dense Gaussian or ±1
    traker       everything, norms and embeddings included       vmap of torch.func.grad; dense Gaussian or ±1

The hook libraries take a sample for one row of a layer's input (B, W, I). The rows of a prompt are laid end to end, so
that the sample is the prompt: a weight gradient is a sum over tokens, whichever sequence they stand in.

No attention mask is passed: with padding on the right, causal attention never shows padding to a real token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from transformers import PreTrainedModel

Group = dict[str, Tensor]
Score = Callable[[], Tensor]
FIELDS = ("ids", "weight", "behavior_logps")
BATCH_PARAMETERS = 4e6  # parameters times prompts at a time; the fastest for models of 0.3 and 24 million parameters
MATRIX_BYTES = 6e9  # of a dense projection, held at a time


def policy_objective(logits: Tensor, ids: Tensor, weight: Tensor, behavior_logps: Tensor) -> Tensor:
    """Σ weight · ρ · log π_θ, from logits (..., C, V) of the last C of W columns; the rest is (..., W)."""
    ids, weight, behavior_logps = (x[..., 1 - logits.shape[-2] :] for x in (ids, weight, behavior_logps))
    logps = logits[..., :-1, :].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return (weight * (logps.detach() - behavior_logps).exp() * logps).sum()


class Part(NamedTuple):
    """Some groups."""

    places: list[int]  # P, among all groups
    data: list[Tensor]  # their FIELDS (P, K, W)
    columns: int  # C, the last ones that need logits; before them all rows are prompt

    @property
    def options(self) -> dict:
        return {"logits_to_keep": self.columns, "use_cache": False}


def parts_of(model: PreTrainedModel, groups: list[Group], batch: int | None) -> list[Part]:
    """Up to `batch` groups at a time, of about the same width."""
    batch = batch or max(1, int(BATCH_PARAMETERS / model.num_parameters()))
    spans = [group["completion"].any(0).nonzero()[:, 0] for group in groups]
    order = sorted(range(len(groups)), key=lambda n: int(spans[n][-1]))
    made = []
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        width, first = int(spans[places[-1]][-1]) + 1, min(int(spans[n][0]) for n in places)
        rows = [[groups[n][name][:, :width] for n in places] for name in FIELDS]
        data = [torch.stack([F.pad(x, (0, width - x.shape[1])) for x in row]) for row in rows]
        made.append(Part(places, data, width - first + 1))
    return made


def freeze(model: PreTrainedModel) -> None:
    """As the hook libraries do: no weight gradients, which no one reads, but a graph from the embedding's output on."""
    model.requires_grad_(False)
    model.enable_input_require_grads()


def backward(model: PreTrainedModel, part: Part) -> None:
    """Of the sum over groups, for the hooks."""
    logits = model(input_ids=part.data[0].flatten(0, 1), **part.options).logits  # (P*K, C, V)
    policy_objective(logits.unflatten(0, part.data[0].shape[:2]), *part.data).backward()


def end_to_end(x: Tensor, samples: int) -> Tensor:
    """(P*K, W, .) -> (P, K*W, .): the tokens of a prompt."""
    return x.unflatten(0, (-1, samples)).flatten(1, 2)


def linear_layers(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def side(layers: int, k: int) -> int:
    """p, such that p² floats for each of the layers are about k in all."""
    below = max(1, int((k / layers) ** 0.5))
    return min((below, below + 1), key=lambda p: abs(layers * p**2 - k))


def dattri_llm(model: PreTrainedModel, groups: list[Group], k: int, seed: int, batch: int | None = None) -> Score:
    """HookManager with LoGra projection, dattri-llm's default. It could cover the embedding as well, as a linear layer
    over one-hot vectors, which leaves fewer dimensions to the others and agrees no better."""
    from dattri_llm import Factorized, HookManager, HookManagerConfig
    from dattri_llm.gradient.ops import materialize

    model, samples = copy.deepcopy(model), len(groups[0]["ids"])
    freeze(model)
    names = linear_layers(model)
    options = {"proj_dim": side(len(names), k), "proj_seed": seed, "proj_max_batch_size": 8}
    config = HookManagerConfig(
        hook_types=dict.fromkeys(names, "linear_io"), include_frozen=True, projection_kwargs={"__default__": options}
    )
    manager = HookManager(model, config)
    parts = parts_of(model, groups, batch)

    def score() -> Tensor:
        sketch = torch.empty(len(groups), len(names) * options["proj_dim"] ** 2)
        for part in parts:
            with manager.collect():
                backward(model, part)
            caught = manager.get_gradient().data
            factors = [(caught[name].activation, caught[name].pre_activation_grad) for name in names]
            by_prompt = [Factorized(*(end_to_end(x, samples) for x in pair)) for pair in factors]
            sketch[part.places] = torch.cat([materialize(pair, "nn.Linear") for pair in by_prompt], 1)
        return sketch

    return score


def bergson(model: PreTrainedModel, groups: list[Group], k: int, seed: int, batch: int | None = None) -> Score:
    """Its collector for the gradients of a training step, in a subclass that lays a prompt's sequences end to end."""
    from bergson import GradientProcessor
    from bergson.collector.gradient_collectors import StreamingGradientCollector

    class ByPrompt(StreamingGradientCollector):
        def forward_hook(self, module: nn.Module, a: Tensor) -> None:
            super().forward_hook(module, end_to_end(a, samples))

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            super().backward_hook(module, end_to_end(g, samples))

    samples = len(groups[0]["ids"])
    model = copy.deepcopy(model).requires_grad_(True)
    names = linear_layers(model)
    p = side(len(names), k)
    processor = GradientProcessor(projection_dim=p, projection_seed=seed, include_bias=True)
    collector = ByPrompt(model=model, processor=processor, dtype=torch.float32)
    freeze(model)  # only now: the collector takes its dtype from the parameters that are trainable
    parts = parts_of(model, groups, batch)

    def score() -> Tensor:
        sketch = torch.empty(len(groups), len(names) * p * p)
        for part in parts:
            with collector.with_batch():
                backward(model, part)
            sketch[part.places] = torch.cat([collector.mod_grads[name] for name in names], 1)
        return sketch

    return score


def for_vmap(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the attention that vmap can batch; sdpa's is run sample by sample."""
    model = copy.deepcopy(model).requires_grad_(True)
    model.set_attn_implementation("eager")
    return model


def block_size(coordinates: int, k: int) -> int:
    """Columns of a dense projection to hold at a time. If not all k fit, every call draws the whole matrix anew."""
    return min(k, max(1, int(MATRIX_BYTES / 4 / coordinates)))


def dattri(
    model: PreTrainedModel, groups: list[Group], k: int, seed: int, batch: int | None = None, kind: str = "normal"
) -> Score:
    """The projector behind its `random_project`, which takes gradients as a dictionary. Its AttributionTask would make
    them as one long vector. That takes far longer: the gradient of each tensor fills a vector of all coordinates."""
    from dattri.func.projection import BasicProjector, ProjectionType
    from dattri.func.utils import _vectorize

    model = for_vmap(model)

    def objective(parameters: dict[str, Tensor], options: dict, ids: Tensor, *rest: Tensor) -> Tensor:
        logits = functional_call(model, parameters, ids, options).logits
        return policy_objective(logits, ids, *rest)

    gradients = vmap(grad(objective), in_dims=(None, None, 0, 0, 0))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    size = model.num_parameters()
    projector = BasicProjector(size, k, seed, ProjectionType(kind), torch.device("cpu"), block_size(size, k))
    parts = parts_of(model, groups, batch)
    gradient = torch.empty(len(groups), size)  # of all, since each call of the projector may draw the matrix anew

    def score() -> Tensor:
        for part in parts:
            gradient[part.places] = _vectorize(gradients(parameters, part.options, *part.data), device="cpu")
        return projector.project(gradient, ensemble_id=0)

    return score


def traker(
    model: PreTrainedModel, groups: list[Group], k: int, seed: int, batch: int | None = None, kind: str = "normal"
) -> Score:
    """What TRAKer's `featurize` calls for its features: a gradient computer and a projector."""
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType
    from trak.utils import vectorize

    class Objective(AbstractModelOutput):
        def __init__(self) -> None:
            self.options: dict = {}  # of the batch under way

        def get_output(self, model: nn.Module, weights: dict, buffers: dict, ids: Tensor, *rest: Tensor) -> Tensor:
            logits = functional_call(model, (weights, buffers), ids, self.options).logits
            return policy_objective(logits, ids, *rest)

        def get_out_to_loss_grad(self, *_: object) -> Tensor:
            raise NotImplementedError  # for TRAK's scores, not for its features

    model, objective = for_vmap(model), Objective()
    size, cpu = model.num_parameters(), torch.device("cpu")
    computer = FunctionalGradientComputer(model, objective, size, torch.float32, cpu)
    projector = BasicProjector(size, k, seed, ProjectionType(kind), cpu, block_size(size, k))
    parts = parts_of(model, groups, batch)
    gradient = torch.empty(len(groups), size)  # of all, since each call of the projector may draw the matrix anew

    def score() -> Tensor:
        for part in parts:
            objective.options = part.options
            gradient[part.places] = vectorize(computer.compute_per_sample_grad(part.data), device=cpu)
        return projector.project(gradient, model_id=0) / k**0.5  # as dattri's does it

    return score
