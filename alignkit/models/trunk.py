"""Several roles in one module: where they can, as adapters of one base in memory, else as models side by side.

``roles(batch, ("policy", "value"))`` is one forward for any of them, so that DDP and FSDP wrap one module and no stage
knows what a role is made of. Importing this module imports torch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignkit.models import adapters, logit_form
from alignkit.models.logit_form import LogitForm
from alignkit.models.token_logps import from_logits, token_logps
from alignkit.protocols import Run
from alignkit.runs import lineage


@dataclass(frozen=True)
class Sequences:
    """Prompts and their answers as tensors: right-padded rows, and where each answer is."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    start: Tensor  # [B] tokens of the prompt
    length: Tensor  # [B] tokens of the answer

    @classmethod
    def of(cls, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int, device: Any) -> Sequences:
        """From token ids."""
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return cls(
            torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device),
            (torch.arange(width, device=device) < lengths[:, None]).long(),
            torch.tensor([len(prompt) for prompt in prompts], device=device),
            torch.tensor([len(answer) for answer in answers], device=device),
        )

    @property
    def mask(self) -> Tensor:
        """[B, A] bool: the answers' tokens, A being the longest answer."""
        return torch.arange(int(self.length.max()), device=self.length.device) < self.length[:, None]


@dataclass(frozen=True)
class Logps:
    """What a language model says of the answers' tokens."""

    logps: Tensor  # [B, A], 0 where there is no token
    entropy: Tensor  # [B, A], of the distribution that each token was drawn from


@dataclass
class Member:
    """What a role is made of: a model, and under PEFT which of its adapters."""

    model: Any  # a PeftModel or a Transformers model
    adapter: str | None = None  # under PEFT: the adapter; None: all adapters off
    head: nn.Module | None = None  # the scalar head; None: a language model


def _place(member: Member) -> tuple[int, str | None]:
    """Members of one place have the same hidden states."""
    return id(member.model), member.adapter


class Roles(nn.Module):
    """One module for all roles. Its parameters that require gradients are what is trained."""

    def __init__(
        self, members: dict[str, Member], temperature: float = 1.0, say: Callable[[str], None] = lambda line: None
    ) -> None:
        super().__init__()
        for member in members.values():
            adapters.check_weights_trained(member.model)
        self.say = say
        self._forms: dict[int, LogitForm | None] = {}  # of each model, once it is known
        self.members = members
        self.temperature = temperature
        self.models = nn.ModuleList({id(m.model): m.model for m in members.values()}.values())
        self.heads = nn.ModuleDict({name: m.head for name, m in members.items() if m.head is not None})
        self.config = members["policy"].model.config

    def forward(self, sequences: Sequences, roles: Sequence[str], temperature: float | None = None) -> dict[str, Any]:
        """For each role: :class:`Logps` of a policy or a reference, values [B, A] of a value, scores [B] of a reward.

        A value is of the state before its token; a reward's score is read at the answer's last token. ``temperature``
        is that of log-probabilities, where it is not that of sampling.
        """
        hidden: dict[Any, Tensor] = {}  # a head on the policy costs no forward of its own
        temperature = temperature or self.temperature
        return {role: self._one(role, hidden, sequences, temperature) for role in roles}

    def _one(self, role: str, states: dict[Any, Tensor], sequences: Sequences, temperature: float) -> Any:
        member = self.members[role]
        mask = sequences.mask
        row, column = mask.nonzero(as_tuple=True)
        before = sequences.start[row] + column - 1  # the position that an answer's token is drawn at
        if member.head is not None:
            hidden = self._hidden(role, states, sequences)
            if role in lineage.rewards_in(self.members):
                rows = torch.arange(len(hidden), device=hidden.device)
                return _score(member.head, hidden[rows, sequences.start + sequences.length - 1])
            values = _score(member.head, hidden[row, before])
            return hidden.new_zeros(mask.shape, dtype=torch.float).masked_scatter(mask, values)
        targets, form = sequences.input_ids[row, before + 1], self._form(role)
        if form is None:
            with self.using(role) as model:
                logits = model(**_inputs(sequences)).logits[row, before]
            logps, entropy = from_logits(logits, targets, temperature)
        else:
            states_before = self._hidden(role, states, sequences)[row, before]
            with self.using(role):  # the head may have an adapter too
                logps, entropy = token_logps(_inner(member.model), states_before, targets, temperature, form)
        zeros = torch.zeros(mask.shape, device=logps.device)
        return Logps(zeros.masked_scatter(mask, logps), zeros.masked_scatter(mask, entropy))

    def _hidden(self, role: str, states: dict[Any, Tensor], sequences: Sequences) -> Tensor:
        """The last hidden states [B, T, d] of a role, from ``states`` if a role of the same place was there before."""
        member = self.members[role]
        if _place(member) not in states:
            with self.using(role):
                states[_place(member)] = logit_form.trunk_of(member.model)(**_inputs(sequences)).last_hidden_state
        return states[_place(member)]

    def _form(self, role: str) -> LogitForm | None:
        """How the role's logits follow from its hidden states, measured before its model's first use."""
        model = self.members[role].model
        if id(model) not in self._forms:
            with self.using(role):
                self._forms[id(model)] = logit_form.measure(model)
            if self._forms[id(model)] is None:
                self.say(
                    f"{type(_inner(model)).__name__} does more to its logits than a head, a scale and a cap: "
                    "log-probabilities take its whole logits, which is slower and needs more memory"
                )
        return self._forms[id(model)]

    def describe(self) -> str:
        """What stands in memory: ``"policy, reference, reward, value on one base of 135M weights, 9.8M trained"``."""
        by_model: dict[int, list[str]] = {}
        for name, member in self.members.items():
            by_model.setdefault(id(member.model), []).append(name)
        models = {id(model): model for model in self.models}
        told = []
        for key, names in by_model.items():
            names_of_adapters = getattr(models[key], "peft_config", ())
            size = sum(
                p.numel()
                for n, p in models[key].named_parameters()
                if not any(adapters.is_of(adapter, n) for adapter in names_of_adapters)
            )
            told.append(
                f"{', '.join(names)} on {'one base' if len(names) > 1 else 'a model'} of {size / 1e6:,.0f}M weights"
            )
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return f"{'; '.join(told)}; {trained / 1e6:,.1f}M are trained"

    @contextlib.contextmanager
    def using(self, role: str) -> Iterator[Any]:
        """The model of a role, with its adapter switched on and no other."""
        member = self.members[role]
        with use_adapter(member.model, member.adapter):
            yield member.model

    @torch.no_grad()
    def start_value(self, score: float) -> None:
        """Have a value that knows nothing yet expect this score of every answer."""
        head: Any = self.members["value"].head
        if head is not None and head.bias is not None:
            head.bias.fill_(score)

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters by name."""
        mine = dict(self.named_parameters())
        for name, tensor in weights.items():
            mine[name].copy_(tensor)

    def trained(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """The names and weights of what is trained of a role."""
        member = self.members[role]
        mine = {
            id(p)
            for n, p in member.model.named_parameters()
            if member.adapter is None or adapters.is_of(member.adapter, n)
        }
        return ((n, p) for n, p in self.named_parameters() if p.requires_grad and id(p) in mine)

    def save_policy(self, folder: Path) -> None:
        """Write the policy alone, as a run folder holds it."""
        member = self.members["policy"]
        only = {"selected_adapters": [member.adapter]} if member.adapter else {}
        member.model.save_pretrained(str(folder), **only)

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Recompute activations in the backward pass, each with the adapter that computed them."""
        for model in self.models:
            if any(p.requires_grad for p in model.parameters()):
                inner = _inner(model)
                enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
                enable({"use_reentrant": False, "context_fn": functools.partial(_recompute_alike, model)})

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before Transformers 5.23


def assemble(run: Run, *, value: Literal["adapter", "head"] | None, temperature: float) -> Roles:
    """Roles of a stage that samples: policy and reference from the policy's run, value and reward from the reward's.

    Under PEFT all of them are adapters of the policy's base where they were trained on that base in the same form. A
    reward that was not is loaded by itself, several of one other base together; the value then starts from the policy,
    with a fresh head, as it does where there is no reward model. ``value="head"`` is a scalar head on the policy's own
    hidden states. ``value=None`` is for stages without a value function.
    """
    policy = adapters.without_dropout(run.model("policy"))
    shared = hasattr(policy, "peft_config")
    if shared:
        adapters.check_apart(policy)
    members = {"policy": Member(policy, "default" if shared else None)}
    if not shared:
        members["reference"] = Member(copy.deepcopy(policy).requires_grad_(False))
    elif "policy" in run.records and run.records["policy"]["weights"] == "adapter":
        adapters.copy_adapter(policy, "default", "role_reference", trained=False)
        members["reference"] = Member(policy, "role_reference")
    else:
        members["reference"] = Member(policy, None)
    width = _inner(policy).get_output_embeddings().weight.shape[1]  # some trunks project their last hidden states
    members |= _rewards(run, policy)
    reward = members.get("reward")  # of several the first, from which the value starts
    if value == "head":
        members["value"] = Member(policy, members["policy"].adapter, _head(width, None, trained=True))
    elif value == "adapter" and not shared:
        start = "reward" if reward else "policy"
        model = adapters.without_dropout(run.model("value", start=start))
        if not reward:
            _inner(model).score = _head(width, None, trained=True)
        members["value"] = Member(model, None, _inner(model).score)
    elif value == "adapter":
        theirs: Any = reward.head if reward and reward.model is policy else None
        adapters.copy_adapter(policy, "role_reward" if theirs else "default", "role_value", trained=True)
        trunk = {id(parameter) for parameter in logit_form.trunk_of(policy).parameters()}
        for name, parameter in policy.named_parameters():  # a value has no use for a language model's head
            if adapters.is_of("role_value", name) and id(parameter) not in trunk:
                parameter.requires_grad_(False)
        members["value"] = Member(policy, "role_value", _head(width, theirs.weight if theirs else None, trained=True))
    adapters.without_dropout(policy)
    return Roles(members, temperature, run.say)


def _rewards(run: Run, policy: Any) -> dict[str, Member]:
    """The rewards: adapters of the policy's base, or of one that another of them is on, or models by themselves."""
    records, members = lineage.rewards_in(run.records), dict[str, Member]()
    for role, trunk in lineage.trunks_of_rewards(records, run.config, run.base_weights).items():
        if trunk == role:
            model: Any = adapters.open_run(run.parents[role], records[role], run.dtype).requires_grad_(False)
            inner = _inner(model)
            members[role] = Member(model, "default" if model is not inner else None, inner.score)
        else:
            model = policy if trunk == "policy" else members[trunk].model
            weight = adapters.load_adapter(model, run.parents[role], f"role_{role}", trained=False)
            assert weight is not None  # a reward is saved with its head
            members[role] = Member(model, f"role_{role}", _head(weight.shape[1], weight, trained=False))
    return members


def _head(width: int, weight: Tensor | None, trained: bool) -> nn.Linear:
    """A scalar head in fp32: from a weight, or one that gives 0, with a bias."""
    head = nn.Linear(width, 1, bias=weight is None)
    with torch.no_grad():
        if weight is None:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        else:
            head.weight.copy_(weight)
    return head.requires_grad_(trained)


@contextlib.contextmanager
def use_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Switch a PEFT model to one adapter, or with None to its base, and back; what is trainable stays what it is.

    Modules that PEFT saves whole (``modules_to_save``) and tokens that it trains are switched with the layers. PEFT's
    own ``set_adapter`` also freezes every other adapter, which is wrong where several are trained. This leans on PEFT's
    insides, as nothing else does.
    """
    layers = _tuner_layers(model)
    former = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, former, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _recompute_alike(model: Any) -> tuple[Any, Any]:
    """Contexts of a checkpointed layer's forward and of its second forward: both with the adapter of now."""
    layers = _tuner_layers(model)
    if not layers:
        return contextlib.nullcontext(), contextlib.nullcontext()
    now = None if layers[0]._disable_adapters else layers[0]._active_adapter[0]
    return contextlib.nullcontext(), use_adapter(model, now)


def _tuner_layers(model: Any) -> list[Any]:
    layers = getattr(model, "_alignkit_layers", None)
    if layers is None:
        layers = [module for module in model.modules() if switched(module)] if hasattr(model, "peft_config") else []
        object.__setattr__(model, "_alignkit_layers", layers)
    return list(layers)


def switched(module: nn.Module) -> bool:
    """Whether a module is PEFT's and computes something else for each adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(sequences: Sequences) -> dict[str, Any]:
    return {"input_ids": sequences.input_ids, "attention_mask": sequences.attention_mask, "use_cache": False}


def _score(head: Any, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = head(hidden.to(head.weight.dtype)).squeeze(-1).float()
    return scores
