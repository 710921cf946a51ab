"""The student's weights on their way to its server: written to a folder, loaded by the server from there, and checked.

    save(student, tokenizer, folder)      # Hugging Face format, adapters merged; whole or not there
    reload(server, folder)                # vLLM loads them in place and forgets what it has cached
    compare(server, student)              # the server now gives the probabilities that the student gives here

The folder must be one that the server's host sees under the same path. Loading in place is vLLM's ``reload_weights``, which a
server in development mode (VLLM_SERVER_DEV_MODE=1) offers; its prefix cache must then be emptied, as keys and values of the old
weights would be taken for the new ones'.

vLLM 0.32 on CPU keeps its packed copy of an output layer that shares its weights with the input embeddings, whatever is loaded
later. For servers on CPU the student is therefore written with an output layer of its own (`untied`).
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.endpoints import explain
from distill.errors import ServerError
from distill.export import merged
from distill.models import causal_lm
from distill.rollouts.vllm.client import Server
from distill.runs import replace_folder
from distill.seeds import mix

PROBE = 51  # purpose of the tokens of the probe
_PROBE_TOKENS = 48
# Mean distance of a token's log-probability in nats, between two implementations of the same weights.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


def save(student: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, untie: bool) -> None:
    """Write the student as it is to ``folder``, in place of what is there. Raises ServerError where that fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model = merged(student)
        (untied(model) if untie else model).save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        replace_folder(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ServerError(
            f"the student's weights cannot be written to {folder}: {error}; set rollout.vllm.weights"
        ) from None


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy whose output layer no longer shares the weights of its input embeddings."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        return model
    model = copy.deepcopy(model)
    model.config.tie_word_embeddings = False
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone())
    return model


def reload(server: Server, folder: Path) -> None:
    """Make the server use the weights in ``folder``. No request may be under way. Raises ServerError."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
    for path, sent in (("/collective_rpc", body), ("/reset_prefix_cache", None)):
        status, answer = server.http.ask("POST", path, sent, patient=False)
        if status == 404:
            raise ServerError(
                f"{server.http.name} at {server.http.address} takes no new weights; start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment, where no stranger can reach it"
            )
        if status != 200:
            raise ServerError(
                f"{server.http.name} at {server.http.address} could not load the weights in {folder} ({explain(answer)}); that "
                "folder must be visible to it under this path (rollout.vllm.weights), and hold a model of its own architecture"
            )
        if path == "/reset_prefix_cache" and not answer["success"]:
            raise ServerError(
                f"{server.http.name} at {server.http.address} kept its prefix cache of the old weights, as somebody's requests "
                "are under way; give this run a server of its own"
            )


def compare(server: Server, student: nn.Module) -> float:
    """Mean distance, in nats, of log-probabilities here and there on a probe. Raises ServerError where it is too large."""
    model = causal_lm(student)
    device = next(model.parameters()).device
    ids = [mix(PROBE, position) % server.vocabulary for position in range(_PROBE_TOKENS)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1].float()
    ours = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:], device=device).unsqueeze(1)).squeeze(1)
    theirs = torch.tensor(server.score(ids, 1, 1).logprobs, device=device)
    distance = float((ours - theirs).abs().mean())
    limit = _TOLERANCE[torch.float32 if model.dtype == torch.float32 else torch.bfloat16]
    if not distance <= limit:
        raise ServerError(
            f"{server.http.name} at {server.http.address} does not have the student's weights: log-probabilities of a probe "
            f"differ by {distance:.3g} nats on average (at most {limit:g} by rounding). Is it the model of model.student.path, in "
            f"{str(model.dtype).removeprefix('torch.')}, with --logprobs-mode=raw_logprobs? (vLLM 0.32 on CPU cannot renew an "
            "output layer tied to the embeddings: let the run start its server, or serve a copy with tie_word_embeddings=false)"
        )
    return distance
