"""Several roles in one module: as adapters of one base in memory if possible, else as separate models.

``roles(sequences, ("policy", "value"))`` is one forward for any of them. DDP wraps one module, and no stage knows
whether a role is an adapter or a model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.models import adapters, logit_form, peft_internals
from alignkit.models.logit_form import LogitForm, base_of
from alignkit.models.lora_forward import lora_forward
from alignkit.models.sequences import Logps, Sequences
from alignkit.models.sharded import is_sharded, shard_like
from alignkit.models.token_logps import from_logits, token_logps
from alignkit.runs import lineage


@dataclass
class Member:
    """The model of a role, and under PEFT which of its adapters the role uses."""

    model: Any  # a PeftModel or a Transformers model
    adapter: str | None = None  # of a PEFT model; None: the base without adapters
    head: nn.Module | None = None  # the scalar head; None for a language model


def _key(member: Member) -> tuple[int, str | None]:
    """Members with the same key have the same hidden states."""
    return id(member.model), member.adapter


class Roles(nn.Module):
    """One module for all roles. Its parameters that require gradients are trained."""

    def __init__(
        self, members: dict[str, Member], temperature: float = 1.0, say: Callable[[str], None] = lambda line: None
    ) -> None:
        super().__init__()
        for member in members.values():
            adapters.check_weights_trained(member.model)
        self.say = say
        self.members = members
        self.temperature = temperature
        self.models = nn.ModuleList({id(m.model): m.model for m in members.values()}.values())
        self.heads = nn.ModuleDict({name: m.head for name, m in members.items() if m.head is not None})
        self.config = members["policy"].model.config
        self.prepared: dict[Any, Any] | None = None  # adapters in the compute dtype, while weights are constant
        self.shared_mask: torch.dtype | None = None  # of the mask, if equal prompts are computed once

    def sequences(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int, device: Any, role: str = "policy"
    ) -> Sequences:
        """Token ids as input of a role. Neighboring equal prompts are computed once if ``shared_mask`` is set.

        It is set for the policy's model. A role on another model gets a row for each answer.
        """
        on_policy = self.members[role].model is self.members["policy"].model
        return Sequences.of(prompts, answers, pad, device, self.shared_mask if on_policy else None)

    def forward(self, sequences: Sequences, roles: Sequence[str], temperature: float | None = None) -> dict[str, Any]:
        """For each role: :class:`Logps` of a policy or a reference, values [B, A] of a value, scores [B] of a reward.

        A value is that of the state before its token. A reward's score is read at the answer's last token.
        ``temperature`` is the temperature of log-probabilities, by default that of sampling.
        """
        hidden: dict[Any, Tensor] = {}  # a head on the policy's hidden states needs no forward of its own
        temperature = temperature or self.temperature
        return {role: self._forward_role(role, hidden, sequences, temperature) for role in roles}

    def _forward_role(self, role: str, states: dict[Any, Tensor], sequences: Sequences, temperature: float) -> Any:
        member = self.members[role]
        if member.head is not None:
            hidden = self._hidden(role, states, sequences)
            if role in lineage.rewards_in(self.members):
                return apply_head(member.head, sequences.gather(hidden, sequences.ends))
            return sequences.scatter(apply_head(member.head, sequences.gather(hidden, sequences.before)))
        form = self._form
        if form is None:
            with self.using(role) as model, lora_forward(model, self.prepared):
                logits = sequences.gather(model(**sequences.inputs).logits, sequences.before)
            logps, entropy = from_logits(logits, sequences.targets, temperature)
        else:
            states_before = sequences.gather(self._hidden(role, states, sequences), sequences.before)
            with self.using(role):  # the head may have an adapter too
                logps, entropy = token_logps(base_of(member.model), states_before, sequences.targets, temperature, form)
        return Logps(sequences.scatter(logps), sequences.scatter(entropy))

    def _hidden(self, role: str, states: dict[Any, Tensor], sequences: Sequences) -> Tensor:
        """The last hidden states [R, T, d] of a role, computed once for roles with the same model and adapter."""
        member = self.members[role]
        if _key(member) not in states:
            with self.using(role) as model, lora_forward(model, self.prepared):
                states[_key(member)] = logit_form.trunk_of(model)(**sequences.inputs).last_hidden_state
        return states[_key(member)]

    @contextlib.contextmanager
    def constant_weights(self) -> Iterator[None]:
        """Cast each adapter only once for all forwards meanwhile. No weight may change.

        Sharded adapters are cast in each forward, which gathers them.
        """
        self.prepared = None if is_sharded(self) else {}
        try:
            yield
        finally:
            self.prepared = None

    def _checkpoint_contexts(self, model: Any) -> tuple[Any, Any]:
        """``context_fn`` of ``torch.utils.checkpoint``: recompute as in the forward, with the same adapter."""
        forward, use_adapter = peft_internals.checkpoint_contexts(model)

        @contextlib.contextmanager
        def recompute() -> Iterator[None]:
            with use_adapter, lora_forward(model, self.prepared):
                yield

        return forward, recompute()

    @functools.cached_property
    def _form(self) -> LogitForm | None:
        """The form of logits, measured once on the policy: the reference is the same architecture."""
        with self.using("policy") as model:
            form = logit_form.measure(model)
        if form is None:
            self.say(
                f"{type(base_of(model)).__name__}: log-probabilities are computed from full logits, which is "
                "slower and needs more memory, because they do not follow from a head with a scale and a cap"
            )
        return form

    def describe(self) -> str:
        """The models in memory: ``"policy, reference, value on one base of 135M parameters; 9.8M are trained"``."""
        by_model: dict[int, list[str]] = {}
        for name, member in self.members.items():
            by_model.setdefault(id(member.model), []).append(name)
        models = {id(model): model for model in self.models}
        parts = []
        for key, names in by_model.items():
            adapters_of_model = getattr(models[key], "peft_config", ())
            size = sum(
                p.numel()
                for n, p in models[key].named_parameters()
                if not any(peft_internals.belongs_to(adapter, n) for adapter in adapters_of_model)
            )
            parts.append(
                f"{', '.join(names)} on {'one base' if len(names) > 1 else 'a model'} of {size / 1e6:,.0f}M parameters"
            )
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return f"{'; '.join(parts)}; {trained / 1e6:,.1f}M are trained"

    @contextlib.contextmanager
    def using(self, role: str) -> Iterator[Any]:
        """The model of a role, with the role's adapter active and no other."""
        member = self.members[role]
        with peft_internals.use_adapter(member.model, member.adapter):
            yield member.model

    @torch.no_grad()
    def start_value(self, score: float) -> None:
        """Set the bias of an untrained value head, so that it predicts this score for every answer."""
        head: Any = self.members["value"].head
        if head is not None and head.bias is not None:
            head.bias.fill_(score)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters by name."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights.items():
            parameters[name].copy_(shard_like(parameters[name], tensor))

    def trained(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """The names and values of a role's trained parameters."""
        member = self.members[role]
        own = {
            id(p)
            for n, p in member.model.named_parameters()
            if member.adapter is None or peft_internals.belongs_to(member.adapter, n)
        }
        return ((n, p) for n, p in self.named_parameters() if p.requires_grad and id(p) in own)

    def save_policy(self, folder: Path) -> None:
        """Write the policy alone, in the format of a run folder."""
        member = self.members["policy"]
        only = {"selected_adapters": [member.adapter]} if member.adapter else {}
        member.model.save_pretrained(str(folder), **only)

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Recompute activations in the backward pass, with the adapter that was active in the forward pass."""
        for model in self.models:
            if any(p.requires_grad for p in model.parameters()):
                inner = base_of(model)
                enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
                enable({"use_reentrant": False, "context_fn": functools.partial(self._checkpoint_contexts, model)})

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before Transformers 5.23


def apply_head(head: Any, hidden: Tensor) -> Tensor:
    """A scalar head on hidden states [..., d], computed in the head's own dtype: [...] in fp32."""
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = head(hidden.to(head.weight.dtype)).squeeze(-1).float()
    return scores
